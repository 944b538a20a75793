"""What is measured on a finished model, and the images it is measured on.

Axis legend: `n` images, `C` channels, `H` and `W` height and width, `K` classes.
"""
from pathlib import Path
from typing import Any, ClassVar, Dict, List, Optional, Tuple

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import Dataset

import ewa
from ewa.data import Wrapper
from ewa.moe import MeanFormMoE, RandomPartitionMoE, moe_layers


class Memory(Wrapper):
    """Keeps the images of a split as they leave the transform, for runs without augmentation; one copy a process."""

    every: ClassVar[Dict[Tuple[str, str], Dict[int, Any]]] = {}

    def __init__(self, dataset: Dataset, key: str) -> None:
        super().__init__(dataset)
        self.key = key
        self.kept: Dict[int, Any] = {}

    @property
    def transform(self):
        return self.dataset.transform  # timm's and torchvision's have one

    @transform.setter
    def transform(self, transform) -> None:
        self.dataset.transform = transform
        self.kept = self.every.setdefault((self.key, repr(transform)), {})

    def __getitem__(self, index: int):
        if index not in self.kept:
            self.kept[index] = self.dataset[index]
        return self.kept[index]


def tensors(split: Path, config: Dict[str, Any], limit: Optional[int] = None) -> Tuple[Tensor, Tensor]:
    """Images `(n, C, H, W)`, prepared as for validation, and labels `(n,)` of a split, evenly `limit` of them."""
    dataset = Memory(create_dataset('', root=str(split), input_img_mode='L' if config['input_size'][0] == 1 else 'RGB'),
                     str(split))
    dataset.transform = create_transform(
        config['input_size'], mean=config['mean'], std=config['std'], crop_pct=config['crop_pct'],
        interpolation=config['interpolation'])
    count = min(limit or len(dataset), len(dataset))
    pairs = [dataset[i * len(dataset) // count] for i in range(count)]
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 500) -> Tensor:
    """Logits `(n, K)` on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model(batch.to(device)).float().cpu() for batch in images.split(batch_size)])


def metrics(logits: Tensor, labels: Tensor) -> Dict[str, float]:
    """Top-1 (per cent), negative log-likelihood and expected calibration error (15 bins)."""
    confidence, guess = logits.softmax(1).max(1)
    right = (guess == labels).float()
    bins = (confidence * 15).long().clamp(max=14)
    gaps = [(right[bins == b].sum() - confidence[bins == b].sum()).abs().item() for b in range(15)]
    return dict(
        top1=100 * right.mean().item(), nll=nn.functional.cross_entropy(logits, labels).item(),
        ece=sum(gaps) / len(labels))


def score(folder: Path, test: Path, trained_on: Optional[Path] = None) -> Dict[str, Dict[str, float]]:
    """What is measured on a finished model.

    Args:
        folder: The model.
        test: Its test split.
        trained_on: The split it was trained on, for `'robust'`.

    Returns:
        `'test'`: metrics on the test set. For random-partition layers also `'routed'`: the same on a quarter of the
        test set with each token through a random expert, as in training; `'dense'`: that quarter by the experts' mean.
        `'robust'`: metrics of the dense form on a quarter of the test set with Gaussian noise of standard deviation 0.5
        (of the normalised pixels) on the images; `sharpness`: the mean rise of the loss on 1,000 training images when
        every matrix is moved a tenth of its norm in a random direction (5 directions).
    """
    model = ewa.load(folder).eval().to('cuda' if torch.cuda.is_available() else 'cpu')
    config = resolve_model_data_config(model)
    images, labels = tensors(test, config)
    logits = predict(model, images)
    result = dict(test=metrics(logits, labels))
    layers = [module for module in model.modules() if type(module) in (RandomPartitionMoE, MeanFormMoE)]
    if layers and len(layers) == len(list(moe_layers(model))):
        result['dense'] = metrics(logits[::4], labels[::4])
        torch.manual_seed(0)
        for layer in layers:
            layer.train()
        result['routed'] = metrics(predict(model, images[::4]), labels[::4])
        model = ewa.to_dense(model).eval()
    if trained_on is not None and not any(moe_layers(model)):
        generator = torch.Generator().manual_seed(0)
        part, part_labels = images[::4], labels[::4]
        noise = torch.randn(part.shape, generator=generator)
        robust = {f'noisy_{k}': v for k, v in metrics(predict(model, part + 0.5 * noise), part_labels).items()}
        images, labels = tensors(trained_on, config, 1000)
        loss = metrics(predict(model, images), labels)['nll']
        matrices = [p for p in model.parameters() if p.ndim > 1]
        weights = [p.detach().clone() for p in matrices]
        rises = []
        for _ in range(5):
            with torch.no_grad():
                for p, w in zip(matrices, weights):
                    direction = torch.randn(w.shape, generator=generator).to(w)
                    p.copy_(w + 0.1 * w.norm() * direction / direction.norm())
            rises.append(metrics(predict(model, images), labels)['nll'] - loss)
        result['robust'] = dict(robust, train_nll=loss, sharpness=sum(rises) / len(rises))
    return result


def course(folder: Path, points: int = 8) -> Dict[str, List[List[float]]]:
    """Distance to the mean and cosine of each layer's experts over training, `{name: [[update, value], ...]}`.

    Read from the TensorBoard events of a run, thinned out to about `points` of them.
    """
    events = EventAccumulator(str(folder), size_guidance=dict(scalars=0)).Reload()
    result = {}
    for tag in events.Tags()['scalars']:
        if tag.startswith(('experts_distance/', 'experts_cosine/', 'experts_entropy/')):
            scalars = events.Scalars(tag)
            chosen = sorted({round(i * (len(scalars) - 1) / max(1, points - 1)) for i in range(points)})
            result[tag[8:]] = [[scalars[i].step, float(f'{scalars[i].value:.3g}')] for i in chosen]
    return result
