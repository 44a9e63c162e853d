"""Facts in a checkpoint about its encoder."""

from moco.encoder import metadata


def test_valid_mean_and_std_of_a_checkpoint_are_read():
    """A mean of 0 with a std of 1 is valid, as it changes no color; a std of 0 is not."""

    def read(mean, std):
        found = metadata.read_metadata({"args": {"mean": mean, "std": std}})
        return found.mean, found.std

    assert read([0.0, 0.0, 0.0], (1.0, 1.0, 1.0)) == ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    assert read([0.5, 0.5, 1.5], [0.5, 0.0, 0.5]) == read([0.5, 0.5], ["0.5"] * 3) == (None, None)
