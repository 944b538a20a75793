"""EWA in Lightning: the experts of a LightningModule are pulled after each optimizer step."""
from typing import Any, Dict, Optional

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.hooks import RemovableHandle

from ..averaging import ExpertAverager
from ..diagnostics import distances_to_mean


class EWACallback(Callback):
    """Attaches an `ewa.ExpertAverager` to the optimizer when training starts, and keeps its place in checkpoints.

    Logs `ewa/share_rate` and `ewa/distance` (mean distance of experts to their mean, relative to its norm) at the end
    of each epoch. `averager` is the `ExpertAverager` while there is one.

    Args:
        share_rate, **kwargs: Of `ewa.ExpertAverager`.

    Raises:
        ValueError: When training starts: no optimizer holds the experts; see `ewa.ExpertAverager` for more.

    Example:
        >>> module = MyModule(ewa.to_moe(timm.create_model('vit_small_patch16_224')))
        >>> trainer = lightning.Trainer(callbacks=[EWACallback(share_rate=1e-3)])
        >>> trainer.fit(module, loader)
        >>> ewa.export(ewa.to_dense(module), 'my_vit')
    """

    def __init__(self, share_rate: Any, **kwargs: Any) -> None:
        super().__init__()
        self.arguments = dict(share_rate=share_rate, **kwargs)
        self.averager: Optional[ExpertAverager] = None
        self._handle: Optional[RemovableHandle] = None
        self._loaded: Dict[str, int] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Optimizers are there, and restored from a checkpoint."""
        self.averager = ExpertAverager(pl_module, **self.arguments)
        if self._loaded:
            self.averager.load_state_dict(self._loaded)
        for i, optimizer in enumerate(trainer.optimizers):
            try:
                self._handle = self.averager.attach(optimizer)
                return
            except ValueError:  # it does not hold the experts
                if i + 1 == len(trainer.optimizers):
                    raise

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.averager is not None:
            distances = distances_to_mean(pl_module)
            pl_module.log_dict({
                'ewa/share_rate': self.averager.share_rate, 'ewa/distance': sum(distances.values()) / len(distances)})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._handle is not None:
            self._handle.remove()

    def state_dict(self) -> Dict[str, Any]:
        return dict(self.averager.state_dict()) if self.averager is not None else self._loaded

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        self._loaded = state_dict
