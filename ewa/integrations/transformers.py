"""EWA in transformers' Trainer: the experts of a model are pulled after each optimizer step."""
from typing import Any, Dict, Optional, cast

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..averaging import ExpertAverager
from ..diagnostics import distances_to_mean


class EWACallback(TrainerCallback, ExportableState):
    """Attaches an `ewa.ExpertAverager` to the optimizer when training begins, and keeps its place in checkpoints.

    Adds `ewa/share_rate` and `ewa/distance` (mean distance of experts to their mean, relative to its norm) to what the
    Trainer logs. `averager` is the `ExpertAverager` while there is one.

    A Trainer saves checkpoints under the name of the dense architecture, which warns; they are read again by
    `trainer.train(resume_from_checkpoint=...)`, not by `from_pretrained`.

    Args:
        share_rate, **kwargs: Of `ewa.ExpertAverager`; numbers and names only, the Trainer writes them as JSON.

    Example:
        >>> model = ewa.to_moe(ViTForImageClassification.from_pretrained('google/vit-base-patch16-224'))
        >>> trainer = Trainer(model, arguments, train_dataset=images, callbacks=[EWACallback(share_rate=1e-3)])
        >>> trainer.train()
        >>> ewa.export(ewa.to_dense(model), 'my_vit')
    """

    def __init__(self, share_rate: float, **kwargs: Any) -> None:
        self.arguments = dict(share_rate=share_rate, **kwargs)
        self.position: Dict[str, int] = {}
        self.averager: Optional[ExpertAverager] = None
        self._handle: Optional[RemovableHandle] = None

    def state(self) -> Dict[str, Any]:
        position = self.averager.state_dict() if self.averager is not None else self.position
        return {'args': self.arguments, 'attributes': {'position': position}}

    def on_train_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any,
    ) -> None:
        model: nn.Module = kwargs['model']
        self.averager = ExpertAverager(model, **self.arguments)
        # the Trainer gives a checkpoint's state back to callbacks only when it is told to
        stored = cast(Any, state.stateful_callbacks).get(type(self).__name__, {}) if state.global_step else {}
        position = self.position or stored.get('attributes', {}).get('position')
        if position:
            self.averager.load_state_dict(position)
        self._handle = self.averager.attach(kwargs['optimizer'])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.averager is not None and 'loss' in kwargs.get('logs', {}):
            distances = distances_to_mean(self.averager.model)
            entries = {
                'ewa/share_rate': self.averager.share_rate, 'ewa/distance': sum(distances.values()) / len(distances)}
            kwargs['logs'].update(entries)
            state.log_history[-1].update(entries)

    def on_train_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any,
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
