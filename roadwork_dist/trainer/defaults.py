"""The observers of a run in their order."""

from collections.abc import Sequence

from roadwork_dist.trainer.callbacks.averaging import EmaCallback
from roadwork_dist.trainer.callbacks.batch_size import BatchSizeSearch
from roadwork_dist.trainer.callbacks.nonfinite import NonFiniteGuard
from roadwork_dist.trainer.callbacks.spikes import SpikeGuard
from roadwork_dist.trainer.checkpoint.best import BestWeights
from roadwork_dist.trainer.checkpoint.callback import Checkpointer
from roadwork_dist.trainer.config import TrainConfig
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.guards.hang import HangWatch
from roadwork_dist.trainer.guards.lock import RunLock
from roadwork_dist.trainer.guards.orphan import LauncherWatch
from roadwork_dist.trainer.guards.preemption import Preemption
from roadwork_dist.trainer.tracking.console import Console
from roadwork_dist.trainer.tracking.health import Health
from roadwork_dist.trainer.tracking.jsonl import JsonLines
from roadwork_dist.trainer.tracking.run_folder import ResolvedConfig, RunFolder


def all_callbacks(config: TrainConfig, own: Sequence[Callback] = ()) -> list[Callback]:
    """Average, run folder, figures, best weights, the user's own ones, and checkpoints, as configured.

    The average comes first, so that what follows sees the weights that the next step starts from.
    Own ones see the validated (averaged) weights.
    The checkpointer comes behind them, so that a checkpoint holds what all others did at its step.
    A request to stop is answered last, when all is saved.
    """
    callbacks: list[Callback] = [RunFolder(), RunLock(), LauncherWatch()]
    if config.batch_size_search == "largest":
        callbacks.append(BatchSizeSearch())
    if config.hang_timeout:
        callbacks.append(HangWatch(config.hang_timeout))
    if config.ema.enabled:
        callbacks.append(EmaCallback(config.ema))
    callbacks.append(JsonLines())
    if config.tracking.tensorboard:
        from roadwork_dist.trainer.tracking.tensorboard import TensorBoard

        callbacks.append(TensorBoard())
    if config.tracking.wandb.mode != "disabled":
        from roadwork_dist.trainer.tracking.wandb import WeightsAndBiases

        callbacks.append(WeightsAndBiases(config.tracking.wandb))
    if config.tracking.progress:
        callbacks.append(Console())
    # Behind those it tells, so that a window's figures stand behind its last step.
    callbacks.append(Health(config.tracking.health_every))
    # Before the checkpointer: what is saved behind a spike has gone back already.
    callbacks.append(SpikeGuard(config.spike, config.max_nonfinite_steps))
    # After the checkpointer: the step that ends a run for its loss is in no checkpoint, those before are.
    callbacks += [BestWeights(), *own, Checkpointer(config.checkpoint), ResolvedConfig()]
    return [*callbacks, NonFiniteGuard(config.max_nonfinite_steps), Preemption()]
