import re

import pytest
import yaml

from ewa.model_card import CARD, OURS, model_card

CONVERSION = dict(
    method='average', num_experts=4, router='random', layers=['blocks.1.mlp', 'blocks.3.mlp'],
    versions=dict(ewa='1.2', timm='1.0', torch='2.9'))


def metadata(card):
    _, front, _ = card.split('---\n', 2)
    return yaml.safe_load(front)


@pytest.mark.parametrize('library, task, classes, tags', [
    ('timm', 'image-classification', 3, ['timm', 'transformers', 'ewa']),
    ('timm', 'image-feature-extraction', 0, ['timm', 'ewa']),
    ('transformers', None, None, ['transformers', 'ewa']),
])
def test_metadata_say_what_reads_it_and_claim_no_licence(library, task, classes, tags):
    found = metadata(model_card('vit', library, 'vit_tiny', 5_700_000, CONVERSION, 'ViTModel', classes))
    expected = dict(library_name=library, pipeline_tag=task, tags=tags)
    assert found == {key: value for key, value in expected.items() if value is not None}


def test_it_tells_what_is_known_and_nothing_else():
    text = ' '.join(model_card('vit', 'timm', 'vit_tiny', 5_700_000, CONVERSION, num_classes=2, class_names=['a', 'b'],
                               data_config=dict(input_size=(3, 8, 8), mean=(.5,), std=(.25,), interpolation='bicubic',
                                                crop_pct=.9)).split())
    assert CARD == 'README.md' and OURS in text
    for words in ('plain `vit_tiny` of timm', 'Parameters: 5.70 M', '3x8x8, mean [0.5], std [0.25], bicubic, crop 0.9',
                  'Classes: 2: a, b', '2 feed-forward networks were 4 experts each', 'at random', 'method `average`',
                  "create_model('local-dir:vit', pretrained=True)", "from_pretrained('vit')", '1.2, timm 1.0, torch'):
        assert words in text
    assert not re.search(r'accura|top-?1|loss|license', text)
    plain = model_card('vit', 'timm', 'vit_tiny', 1, dict(versions={}))
    assert 'experts' not in plain and 'Classes' not in plain and 'Images' not in plain


def test_many_class_names_are_cut_and_a_router_is_told():
    card = model_card('vit', 'timm', 'vit_tiny', 1, dict(CONVERSION, router='topk', method='refit'), num_classes=30,
                      class_names=[f'c{i}' for i in range(30)])
    assert 'c19, ... (all in config.json)' in card and 'c20' not in card
    assert 'routed by a learned gate' in card and '`refit`' in card
