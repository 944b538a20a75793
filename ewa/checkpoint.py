"""Checkpoints of a run: written whole or not at all, and found again.

Layout: `EXPERIMENT/checkpoints/update-00001234/` holds what `accelerator.save_state` writes, `state.json` (position,
averager, best result, what model this is) and `ema.safetensors`. A folder with that name is complete: it is written
under another name, synced, and renamed.

Random numbers are not part of a checkpoint. They are drawn from streams that are seeded from their place in the run
(`ewa.data.seed_all`: every image from seed, epoch and index; every micro-batch from seed, rank, epoch and batch), so a
resumed run draws what an uninterrupted one would.
"""
import json
import re
import shutil
from pathlib import Path
from typing import Any, Dict, List, Optional

import safetensors.torch
from accelerate import Accelerator
from torch import Tensor

from .exporting import replace_folder

_NAME = re.compile(r'update-(\d{8,})')


def checkpoints(experiment: Path) -> List[Path]:
    """Whole checkpoints of an experiment, oldest first."""
    folder = experiment / 'checkpoints'
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted((path for path in found if (path / 'state.json').is_file()), key=lambda path: int(path.name[7:]))


def save_checkpoint(
        accelerator: Accelerator,
        experiment: Path,
        update: int,
        state: Dict[str, Any],
        ema: Optional[Dict[str, Tensor]] = None,
        keep: int = 2,
) -> None:
    """Write a checkpoint, then remove the oldest beyond `keep`. Called on all processes.

    Args:
        accelerator: Holds model, optimizer and loss scaler.
        experiment: Folder of the run.
        update: Optimizer updates done so far.
        state: JSON-able; found again in `load_state`.
        ema: EMA weights.
        keep: Checkpoints to keep, at least 1.
    """
    final = experiment / 'checkpoints' / f'update-{update:08d}'
    new = final.with_name(f'.{final.name}.new')
    if accelerator.is_main_process:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(new))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if ema is not None:
            safetensors.torch.save_file({k: v.contiguous() for k, v in ema.items()}, new / 'ema.safetensors')
        (new / 'state.json').write_text(json.dumps(dict(state, update=update), indent=2))
        replace_folder(new, final)
        for old in checkpoints(experiment)[:-max(keep, 1)]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def read_state(checkpoint: Path) -> Dict[str, Any]:
    """The `state` a checkpoint was saved with."""
    return json.loads((checkpoint / 'state.json').read_text())


def load_ema(checkpoint: Path) -> Dict[str, Tensor]:
    """The EMA weights of a checkpoint."""
    return safetensors.torch.load_file(checkpoint / 'ema.safetensors')
