"""Creates and checks the run folder, and writes the resolved configuration to it."""

from pathlib import Path

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.files import write_atomic
from roadwork_dist.common.yaml import to_yaml
from roadwork_dist.trainer.engine.collectives import broadcast_object
from roadwork_dist.trainer.events.callback import Callback, Run


def make_run_folder(path: Path) -> None:
    """Create a folder and check that files can be written to it.

    Raises:
        ConfigError: it cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        write_atomic(probe, b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"output_dir {path} cannot be written to ({error.strerror or error}): "
            "choose another with --output_dir, or fix its permissions"
        ) from error


class RunFolder(Callback):
    """Creates the run folder before anything is written to it."""

    def on_fit_start(self, run: Run) -> None:
        """Create it.

        Raises:
            ConfigError: the folder cannot be written to; on every rank.
        """
        refused = None
        if run.accelerator.is_main_process:
            try:
                make_run_folder(run.run_dir)
            except ConfigError as error:
                refused = str(error)
        # All ranks get here, so all raise together instead of waiting for one that is gone.
        refused = broadcast_object(refused)
        if refused is not None:
            raise ConfigError(refused)


class ResolvedConfig(Callback):
    """Writes the resolved configuration to the run folder, once no callback has refused the start."""

    def on_train_start(self, run: Run) -> None:
        """Write ``config.yaml``."""
        if run.accelerator.is_main_process and not run.is_finished:  # it describes what ran
            write_atomic(run.run_dir / "config.yaml", to_yaml(run.config).encode())
