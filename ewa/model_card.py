"""The model card of an exported folder: what it is, how it was made, how it is loaded. It claims nothing else."""
from typing import Any, Dict, Mapping, Optional, Sequence

CARD = 'README.md'
OURS = '# Written by ewa.export. Without this line the card stays when the folder is overwritten.'
_MAX_NAMES = 20

LOAD = {
    'timm': """\
import timm

model = timm.create_model('local-dir:{name}', pretrained=True)  # from the Hub: 'hf-hub:USER/{name}'
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)""",
    'transformers': """\
from transformers import {model_class}

model = {model_class}.from_pretrained('{name}')""",
    'torchvision': """\
from safetensors.torch import load_file

model = ...  # built as it was for training
model.load_state_dict(load_file('{name}/model.safetensors'))""",
}
_THROUGH_WRAPPER = """\
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained('{name}')
processor = AutoImageProcessor.from_pretrained('{name}')"""


def model_card(
        name: str,
        library: str,
        architecture: str,
        parameters: int,
        conversion: Mapping[str, Any],
        model_class: str = '',
        num_classes: Optional[int] = None,
        class_names: Optional[Sequence[str]] = None,
        data_config: Optional[Mapping[str, Any]] = None,
) -> str:
    """A card as Markdown, with the metadata that the Hugging Face Hub reads.

    Args:
        name: Of the folder.
        library: `'timm'`, `'transformers'` or `'torchvision'`, which builds the model.
        architecture: Its name there.
        parameters: How many it has.
        conversion: What is known of the MoE that it was: `method`, `num_experts`, `router`, `layers`, `versions`;
            and of its accuracy, `top1` of `top1_images`.
        model_class: Of transformers, which loads it.
        num_classes: Classes that it tells apart; None where it is not known, 0 for features.
        class_names: Their names, in order.
        data_config: Preprocessing, as by `timm.data.resolve_data_config`.
    """
    features = num_classes == 0
    task = 'image-feature-extraction' if features else 'image-classification'
    wrapped = library == 'timm' and not features
    tags = [library, 'transformers', 'ewa'] if wrapped else [library, 'ewa']
    front = ['---', OURS, f'library_name: {library}']
    front += [f'pipeline_tag: {task}'] if num_classes is not None else []
    front += ['tags:', *(f'- {tag}' for tag in tags), '---']

    lines = [
        *front, '', f'# {name}', '',
        f'A plain `{architecture}` of {library}: nothing but {library} is needed to load it.', '',
        f'- Parameters: {parameters / 1e6:.2f} M']
    if data_config:
        size = 'x'.join(map(str, data_config['input_size']))
        lines += [f'- Images: {size}, mean {list(data_config["mean"])}, std {list(data_config["std"])}, '
                  f'{data_config["interpolation"]}, crop {data_config["crop_pct"]}']
    if num_classes is not None:
        lines += [f'- Classes: {num_classes or "none, it gives features"}' + _names(class_names)]
    if 'top1_images' in conversion:
        lines += [f'- Top-1: {conversion["top1"]:.2f} % of {conversion["top1_images"]} validation images']
    lines += _how(conversion)
    lines += ['', '## Loading it', '']
    loads = [LOAD[library]] + [_THROUGH_WRAPPER] * wrapped
    for load in loads:
        lines += ['```python', load.format(name=name, model_class=model_class), '```', '']
    if library == 'timm':
        lines += ['Without `pretrained=True` timm leaves the weights random and says nothing.', '']
    return '\n'.join(lines)


def _names(class_names: Optional[Sequence[str]]) -> str:
    if not class_names:
        return ''
    names = ', '.join(class_names[:_MAX_NAMES])
    return f': {names}' + (', ... (all in config.json)' if len(class_names) > _MAX_NAMES else '')


def _how(conversion: Mapping[str, Any]) -> Sequence[str]:
    versions: Dict[str, str] = dict(conversion.get('versions') or {})
    written = f'- Written by ewa {versions.get("ewa", "")}'.rstrip()
    written += ''.join(f', {key} {versions[key]}' for key in ('timm', 'transformers', 'torch') if key in versions)
    written += '; its method: [arXiv 2308.06093](https://arxiv.org/abs/2308.06093).'
    if 'method' not in conversion:
        return [written]
    router = 'split among the experts at random' if conversion.get('router') == 'random' else 'routed by a learned gate'
    layers = conversion.get('layers') or []
    return [
        f'- Made from a mixture of experts: {len(layers)} feed-forward networks were {conversion["num_experts"]} '
        f'experts each in training, tokens {router}; these became one by the method `{conversion["method"]}`.',
        written]
