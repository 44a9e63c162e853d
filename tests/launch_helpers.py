"""The environment variables that a launcher sets, for several test modules."""

MEETING = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 23461}
