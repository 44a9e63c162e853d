"""Run a script: parse its options, start its run, and print its errors.

Every script defines three functions. `parser()` declares its options. `complete(config)` validates
the settings and fills in those that depend on others. `worker(config, device)` runs in every
process.

Neither this file nor the top of a script imports torch, so that --help and refused options take a
fraction of a second. `complete` and `worker` import what they need.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from moco import user
from moco.cli.parser import Parser
from moco.config import AnyConfig
from moco.errors import InputError, from_os_error
from moco.launch import output

if TYPE_CHECKING:
    from moco.launch.launch import Worker


def main(parser: Parser, complete: Callable[[AnyConfig], AnyConfig], worker: "Worker") -> None:
    """Run `worker(config, device)` in every process of the run.

    Prints an InputError as one line on stderr, and exits with status 2. A run that has saved after
    a signal exits with status 75. A run that has lost a process exits with status 1.

    Args:
        parser: the script's options.
        complete: called once, before any process starts. Returns the config with the settings that
            depend on others, or raises InputError.
        worker: the work of one process.
    """
    user.prepare()
    output.guard()
    try:
        config = parser.parse()
        user.import_quietly()
        from moco.cli import start

        user.prepare()
        start.start(parser, config, complete, worker)
    except InputError as error:
        parser.refuse(error)
    except OSError as error:
        parser.refuse(from_os_error(error))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
