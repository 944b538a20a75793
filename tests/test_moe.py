import gc
import io
import pickle
import weakref
from copy import deepcopy

import onnx
import pytest
import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models import get_notrace_modules, reparameterize_model
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.models.feature_extraction import create_feature_extractor

import ewa
import ewa.moe
import reference
from ewa.gathering import METHODS, mean
from ewa.moe import MeanFormMoE, RandomPartitionMoE, TopKMoE, is_moe, moe_layers, pulled
from ewa.partition import random_partition
from gated import REWEIGHTED, foreign, gated, sequences


def random_layer(num_experts=4, drop=0.):
    torch.manual_seed(0)
    return RandomPartitionMoE(Mlp(8, 16, drop=drop) for _ in range(num_experts))


def gated_layer(num_experts=4, num_shared=0, **kwargs):
    torch.manual_seed(0)
    layer = TopKMoE(
        [Mlp(8, 16) for _ in range(num_experts)], 8, shared=[Mlp(8, 16) for _ in range(num_shared)], **kwargs)
    nn.init.normal_(layer.router.weight)
    return layer


class Tag(nn.Module):
    """Multiplies by a number that says which expert it is."""

    def __init__(self, tag):
        super().__init__()
        self.tag = nn.Parameter(torch.tensor(float(tag)))

    def forward(self, x):
        return x * self.tag


@pytest.fixture
def moe(tiny):
    return lambda **kwargs: ewa.to_moe(tiny(), **{'init': 'independent', **kwargs})


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


class TestRandomPartition:
    @pytest.mark.parametrize('shape', [(16, 8), (2, 9, 8), (2, 3, 3, 8), (3, 8), (1, 8)])
    def test_training_equals_the_reference_for_the_drawn_partition(self, shape):
        layer, x = random_layer(), torch.randn(shape)
        tokens = x.reshape(-1, 8)
        torch.manual_seed(1)
        owner = reference.owners(*random_partition(len(tokens), 4))
        torch.manual_seed(1)
        out = layer.train()(x)
        assert out.shape == x.shape
        torch.testing.assert_close(out.reshape(-1, 8), reference.partition_forward(tokens, layer.experts, owner))

    def test_every_layer_and_step_draws_over_all_tokens_of_the_batch(self, moe, images, monkeypatch):
        draws = []

        def record(num_tokens, *args, **kwargs):
            draws.append((num_tokens, random_partition(num_tokens, *args, **kwargs)))
            return draws[-1][1]

        monkeypatch.setattr(ewa.moe, 'random_partition', record)
        model = moe(layers='all').train()
        model(images)
        model(images)
        assert [n for n, _ in draws] == [3 * 17] * 8  # 4 layers, 2 steps; the class token is one of the 17
        assert len({tuple(index.tolist()) for _, (index, _, _) in draws}) == 8

    def test_eval_is_the_fused_ffn_to_the_bit(self):
        layer, x = random_layer().eval(), torch.randn(2, 9, 8)
        assert torch.equal(layer(x), layer.fuse()(x))
        assert torch.equal(layer(x), layer(x))

    def test_fuse_is_the_mean_in_new_storage(self):
        layer = random_layer()
        before = deepcopy(layer.state_dict())
        ffn = layer.fuse()
        assert type(ffn) is Mlp and ffn.training == layer.training
        for name, value in ffn.named_parameters():
            values = [expert.get_parameter(name) for expert in layer.experts]
            torch.testing.assert_close(value, reference.mean(values).float())
            with torch.no_grad():
                value.zero_()
        assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())

    @pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_equal_tensors_are_their_own_mean(self, dtype):
        w = torch.randn(1000).to(dtype)
        for num_experts in range(2, 9):
            assert torch.equal(mean([w] * num_experts), w)

    def test_timm_reparameterises_to_the_vanilla_model(self, tiny, images):
        model = ewa.to_moe(tiny(), init='independent').eval()
        vanilla = reparameterize_model(model)
        assert list(vanilla.state_dict()) == list(tiny().state_dict())
        assert torch.equal(vanilla(images), model(images))

    @pytest.mark.parametrize('num_tokens', [0, 1, 3])
    def test_experts_without_tokens_have_gradients(self, num_tokens):
        layer = random_layer().train()
        out = layer(torch.randn(num_tokens, 8))
        assert out.shape == (num_tokens, 8)
        out.sum().backward()
        assert all(p.grad is not None for p in layer.parameters())
        assert sum(bool(e.fc1.weight.grad.any()) for e in layer.experts) == num_tokens

    def test_eval_gradients_reach_all_experts_equally(self):
        layer = random_layer().eval()
        layer(torch.randn(5, 8)).square().sum().backward()
        for name, p in layer.experts[0].named_parameters():
            assert p.grad.any()
            for expert in layer.experts[1:]:
                torch.testing.assert_close(expert.get_parameter(name).grad, p.grad)

    def test_dropout_of_experts_is_off_in_eval(self):
        layer, x = random_layer(drop=.5), torch.randn(5, 8)
        assert not torch.equal(layer.train()(x), layer(x))
        assert torch.equal(layer.eval()(x), layer(x))

    @pytest.mark.parametrize('count', [0, 1])
    def test_fewer_than_two_experts_are_refused(self, count):
        with pytest.raises(ValueError, match='at least 2 experts'):
            RandomPartitionMoE(Mlp(8, 16) for _ in range(count))

    @pytest.mark.parametrize('num_tokens', [16, 18, 3])
    def test_compiled_each_token_has_one_expert(self, num_tokens):
        torch.compiler.reset()
        layer = RandomPartitionMoE(Tag(10. ** e) for e in range(4)).train()
        compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
        seen = set()
        for _ in range(3):
            out = compiled(torch.ones(num_tokens, 1))
            loads = [int((out == 10. ** e).sum()) for e in range(4)]
            assert sum(loads) == num_tokens and max(loads) - min(loads) <= 1
            seen.add(tuple(out.flatten().tolist()))
        assert len(seen) > 1
        # the gradient of a tag is its number of tokens: filling rows add nothing
        out.sum().backward()
        assert [layer.experts[e].tag.grad.item() for e in range(4)] == loads

    @pytest.mark.parametrize('dynamic', [None, True])
    def test_compiled_for_changing_numbers_of_tokens(self, dynamic):
        torch.compiler.reset()
        layer = RandomPartitionMoE(Tag(10. ** e) for e in range(4)).train()
        compiled = torch.compile(layer, fullgraph=True, backend='eager', dynamic=dynamic)
        for num_tokens in (16, 40, 18, 21, 2):
            out = compiled(torch.ones(num_tokens, 1))
            loads = [int((out == 10. ** e).sum()) for e in range(4)]
            assert sum(loads) == num_tokens and max(loads) - min(loads) <= 1


class TokenConv(nn.Module):
    """A convolution over the channels of one token at a time, with an offset that is no matrix."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 1)
        self.offset = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.conv(x.reshape(-1, 8, 1)).reshape(x.shape) + self.offset


FFNS = {
    'plain': lambda: Mlp(8, 16),
    'GLU': lambda: GluMlp(8, 16),
    'norm inside': lambda: SwiGLU(8, 16, norm_layer=nn.LayerNorm),
    'convolution': TokenConv,
}


def mean_layer(ffn='plain', num_experts=4, spread=.3):
    torch.manual_seed(0)
    return MeanFormMoE([FFNS[ffn]() for _ in range(num_experts)], spread)


class TestMeanForm:
    @pytest.mark.parametrize('ffn', FFNS)
    @pytest.mark.parametrize('shape', [(16, 8), (2, 9, 8), (3, 8)])
    def test_training_equals_the_reference_for_the_drawn_partition(self, ffn, shape):
        layer, x = mean_layer(ffn), torch.randn(shape)
        tokens = x.reshape(-1, 8)
        torch.manual_seed(1)
        owner = reference.owners(*random_partition(len(tokens), 4))
        torch.manual_seed(1)
        out = layer.train()(x)
        expected = reference.partition_forward(tokens, reference.mean_form_experts(layer), owner)
        torch.testing.assert_close(out.reshape(-1, 8), expected)

    @pytest.mark.parametrize('ffn', FFNS)
    def test_gradients_are_the_sum_and_the_centred_differences(self, ffn):
        layer, x = mean_layer(ffn), torch.randn(3, 9, 8)
        torch.manual_seed(1)
        owner = reference.owners(*random_partition(27, 4))
        torch.manual_seed(1)
        layer.train()(x).square().sum().backward()
        experts = reference.mean_form_experts(layer)
        reference.partition_forward(x.reshape(-1, 8), experts, owner).square().sum().backward()
        for name, m in layer.mean.named_parameters():
            gradients = [expert.get_parameter(name).grad for expert in experts]
            torch.testing.assert_close(m.grad, sum(gradients), rtol=1e-4, atol=1e-5)
            for deviation, gradient in zip(layer.deviations, gradients):
                torch.testing.assert_close(
                    deviation.get_parameter(name).grad, .3 * (gradient - sum(gradients) / 4), rtol=1e-4, atol=1e-5)

    def test_the_mean_is_the_module_of_the_host(self):
        ffn = Mlp(8, 16)
        weights = deepcopy(ffn.state_dict())
        parameters = list(ffn.parameters())
        layer = MeanFormMoE([ffn, deepcopy(ffn), deepcopy(ffn)])
        assert layer.mean is ffn
        assert all(p is q for p, q in zip(layer.mean.parameters(), parameters))
        assert all(torch.equal(weights[key], value) for key, value in ffn.state_dict().items())
        assert not any(p.any() for p in layer.deviations.parameters())
        assert list(layer.state_dict()) == [f'mean.{key}' for key in weights] + [
            f'deviations.{i}.{key}' for i in range(3) for key in weights]

    @pytest.mark.parametrize('spread', [.1, 1., 3.])
    def test_experts_are_those_it_is_made_of(self, spread):
        experts = [FFNS['norm inside']() for _ in range(4)]
        layer = MeanFormMoE(deepcopy(experts), spread)
        for expert, given, expected in zip(layer.experts, experts, reference.mean_form_experts(layer)):
            assert type(expert) is type(given)
            for name, p in expert.named_parameters():
                torch.testing.assert_close(p, given.get_parameter(name))
                torch.testing.assert_close(p, expected.get_parameter(name))

    def test_copies_train_as_the_published_form_at_the_first_pass(self):
        ffn, x = Mlp(8, 16), torch.randn(3, 9, 8)
        outputs = []
        for layer in (RandomPartitionMoE([deepcopy(ffn) for _ in range(4)]), MeanFormMoE([ffn] + [deepcopy(ffn)] * 3)):
            torch.manual_seed(1)
            outputs.append(layer.train()(x))
        assert torch.equal(*outputs)

    def test_no_copy_of_an_expert_is_kept(self):
        layer, x = mean_layer(), torch.randn(5, 8)
        before = {name: id(p) for name, p in layer.named_parameters()}
        attributes = {id(module): set(vars(module)) for module in layer.modules()}
        made = []
        states = layer.expert_states
        layer.expert_states = lambda: [made.append(weakref.ref(w)) or s for s in states() for w in s.values()][::4]
        attributes[id(layer)].add('expert_states')
        layer.train()(x).sum().backward()
        gc.collect()
        assert len(made) == 16 and not any(ref() is not None for ref in made)
        assert {name: id(p) for name, p in layer.named_parameters()} == before
        assert {id(module): set(vars(module)) for module in layer.modules()} == attributes

    def test_eval_is_the_mean_to_the_bit(self):
        layer, x = mean_layer().eval(), torch.randn(2, 9, 8)
        assert torch.equal(layer(x), layer.mean(x))
        fused = layer.fuse()
        assert type(fused) is Mlp and torch.equal(fused(x), layer(x))
        layer(x).sum().backward()
        assert all(p.grad is None for p in layer.deviations.parameters())
        with torch.no_grad():
            fused.fc1.weight.zero_()
        assert layer.mean.fc1.weight.all()

    def test_scripts_traces_and_exports_as_the_plain_ffn(self, tmp_path):
        model, x = nn.Sequential(mean_layer()).eval(), torch.randn(5, 8)
        expected = model(x)
        assert torch.equal(torch.jit.trace(model, x)(x), expected)
        plain = nn.Sequential(model[0].fuse())
        operators = []
        for host in (model, plain):
            torch.onnx.export(host, (x,), tmp_path / 'model.onnx', dynamo=False)
            graph = onnx.load(tmp_path / 'model.onnx').graph
            operators.append(([node.op_type for node in graph.node], len(graph.initializer)))
        assert operators[0] == operators[1]
        with SummaryWriter(str(tmp_path)) as board:
            board.add_graph(model, x)
        scripted = torch.jit.script(model)
        assert torch.equal(scripted(x), expected)
        assert list(scripted.state_dict()) == list(plain.state_dict())

    def test_copies_and_pickles_after_a_training_pass(self):
        layer, x = mean_layer().train(), torch.randn(5, 8)
        layer(x).sum().backward()
        for copy in (deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert copy.spread == .3 and is_moe(copy)
            assert torch.equal(copy.eval()(x), layer.mean(x))

    def test_compiles_once_without_a_graph_break(self):
        torch.compiler.reset()
        layer, x = mean_layer().train(), torch.randn(18, 8)
        compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                compiled(x).square().sum().backward()
                assert all(p.grad.isfinite().all() for p in layer.parameters())
                with torch.no_grad():
                    for p in layer.parameters():
                        p.add_(p.grad, alpha=-.01)

    def test_experts_without_tokens_have_gradients(self):
        layer = mean_layer().train()
        layer(torch.randn(1, 8)).sum().backward()
        assert all(p.grad is not None for p in layer.parameters())

    def test_frozen_parameters_have_frozen_deviations(self):
        ffn = Mlp(8, 16)
        ffn.fc1.requires_grad_(False)
        layer = MeanFormMoE([deepcopy(ffn) for _ in range(4)]).train()
        layer(torch.randn(9, 8)).sum().backward()
        assert {name.split('.', 2)[2] for name, p in layer.deviations.named_parameters('deviations') if p.grad is None
                } == {'fc1.weight', 'fc1.bias'}

    @pytest.mark.parametrize('spread', [-.1, float('nan'), float('inf')])
    def test_a_spread_out_of_its_range_is_refused(self, spread):
        with pytest.raises(ValueError, match=f'spread must be .* got {spread}'):
            mean_layer(spread=spread)

    def test_unequal_experts_without_spread_are_refused(self):
        with pytest.raises(ValueError, match='unequal need a spread above 0'):
            mean_layer(spread=0)

    def test_the_pull_acts_on_deviations(self):
        layer = mean_layer()
        assert is_moe(layer) and pulled(layer) is layer.deviations
        published = random_layer()
        assert pulled(published) is published.experts


@pytest.mark.parametrize('form', ['experts', 'mean'])
@pytest.mark.parametrize('num_experts', [3, 4])
def test_model_compiles_without_a_graph_break(tiny, images, num_experts, form):
    torch.compiler.reset()
    model = ewa.to_moe(tiny(depth=2), num_experts, init='independent', form=form)  # 51 tokens: divisible by 3 only
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    compiled.train()(images).square().sum().backward()
    assert all(g.isfinite().all() for g in gradients(model).values())
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(images), model.eval()(images))


def of_convolutions(layer):
    """The layer with 1x1 convolutions of the same weights for its linear maps; for `(B, D, height, width)`."""
    experts = [Mlp(8, 16, use_conv=True) for _ in layer.experts]
    for conv, expert in zip(experts, layer.experts):
        conv.load_state_dict({
            key: value[..., None, None] if value.dim() == 2 else value for key, value in expert.state_dict().items()})
    if isinstance(layer, TopKMoE):
        made = TopKMoE(experts, 8, layer.top_k, shared=[deepcopy(experts[0]) for _ in getattr(layer, 'shared', ())])
        made.router.load_state_dict(layer.router.state_dict())
        return made
    return MeanFormMoE(experts, layer.spread) if isinstance(layer, MeanFormMoE) else RandomPartitionMoE(experts)


@pytest.mark.parametrize('make', [random_layer, mean_layer, gated_layer])
@pytest.mark.parametrize('size', [(5, 4), (1, 1)])
def test_experts_of_1x1_convolutions_compute_as_those_of_linear_maps(make, size):
    layer = make()
    conv = of_convolutions(layer)
    x = torch.randn(3, *size, 8)
    for train in (True, False):
        out = []
        for module, tokens in ((layer, x), (conv, x.movedim(-1, 1))):
            torch.manual_seed(1)
            out.append(module.train(train)(tokens))
        torch.testing.assert_close(out[1].movedim(1, -1), out[0])
    conv.train()(x.movedim(-1, 1)).sum().backward()  # of three tokens some experts have none
    assert all(p.grad is not None for p in conv.parameters())
    if make is not gated_layer:
        assert torch.equal(conv.fuse().eval()(x.movedim(-1, 1)), conv.eval()(x.movedim(-1, 1)))



def test_infinite_bounds_in_buffers_stay_in_the_mean():
    def bounded(top):
        expert = Mlp(8, 16)
        expert.register_buffer('top', torch.tensor(top))
        return expert

    layer = RandomPartitionMoE(bounded(float('inf')) for _ in range(3))
    assert layer.fuse().top == float('inf')
    assert RandomPartitionMoE([bounded(1.), bounded(3.)]).fuse().top == 2


class TestTopK:
    @pytest.mark.parametrize('train', [True, False])
    @pytest.mark.parametrize('top_k, renormalise, num_shared', [
        (1, True, 0), (2, True, 1), (2, False, 2), (4, True, 0)])
    def test_forward_is_the_gated_sum(self, train, top_k, renormalise, num_shared):
        layer = gated_layer(num_shared=num_shared, top_k=top_k, renormalise=renormalise).train(train)
        x = torch.randn(2, 5, 8)
        tokens = x.reshape(-1, 8)
        logits = tokens @ layer.router.weight.T
        shared = getattr(layer, 'shared', ())
        assert len(shared) == num_shared
        expected = reference.top_k_forward(tokens, layer.experts, logits, top_k, renormalise, shared)
        torch.testing.assert_close(layer(x), expected.reshape(2, 5, 8))
        chosen = reference.gates(logits, top_k)
        assert layer.counts.tolist() == [sum(e in gate for gate in chosen) for e in range(4)]

    def test_unused_experts_have_gradients(self):
        layer = gated_layer(top_k=1).train()
        layer(torch.randn(1, 8)).sum().backward()
        assert all(p.grad is not None for p in layer.parameters())
        assert layer(torch.zeros(0, 8)).shape == (0, 8)

    def test_without_values_it_says_that_it_cant_route(self):
        with torch.device('meta'), pytest.raises(ValueError, match='on the meta device they have none'):
            TopKMoE([Mlp(8, 16), Mlp(8, 16)], 8)(torch.empty(2, 3, 8))

    def test_has_no_fuse(self):
        assert not hasattr(gated_layer(), 'fuse')

    def test_losses_are_of_the_last_training_pass_averaged_over_layers(self, moe, images):
        model = moe(router='topk', num_experts=4)
        logits = []
        for _, layer in moe_layers(model):
            layer.register_forward_pre_hook(
                lambda layer, args: logits.append(args[0].reshape(-1, 32) @ layer.router.weight.T))
        model.train()(images)
        assert len(logits) == 2
        losses = ewa.routing_losses(model)
        balance = [reference.load_balancing_loss(x.detach(), 2) for x in logits]
        assert losses['load_balance'].item() == pytest.approx(sum(balance) / 2, rel=1e-4)
        z = [x.logsumexp(-1).square().mean().item() for x in logits]
        assert losses['z'].item() == pytest.approx(sum(z) / 2, rel=1e-4)
        (losses['load_balance'] + losses['z']).backward()
        assert all(layer.router.weight.grad.any() for _, layer in moe_layers(model))
        model.eval()(images)
        assert ewa.routing_losses(model) == {} == ewa.routing_losses(nn.Linear(2, 2))

    def test_random_partition_has_no_losses(self, moe, images):
        model = moe().train()
        model(images)
        assert ewa.routing_losses(model) == {}

    def test_copies_and_pickles_after_a_training_pass(self, moe, images):
        model = moe(router='topk').train()
        model(images)
        for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copy.eval()(images), model.eval()(images))
            model.train()(images)

    @pytest.mark.parametrize('top_k', [0, 5])
    def test_top_k_out_of_range_is_refused(self, top_k):
        with pytest.raises(ValueError, match=f'between 1 and the number of experts 4, got {top_k}'):
            gated_layer(top_k=top_k)

    def test_routes_in_float32_under_autocast(self):
        layer, x = gated_layer().eval(), torch.randn(50, 8)
        expected = layer.route(x)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            for value, other in zip(layer.route(x), expected):
                assert torch.equal(value, other)
            assert layer(x).dtype == torch.bfloat16


ROUTERS = [
    dict(router='random'), dict(router='random', form='mean'), dict(router='topk'),
    dict(router='topk', num_shared=1, expert_ratio=.25)]


@pytest.mark.parametrize('kwargs', ROUTERS)
def test_trains_under_autocast(moe, images, kwargs):
    model = moe(init='independent', **kwargs)
    with torch.no_grad():
        expected = model.eval()(images)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = model(images)
        assert (out.float() - expected).abs().max() < .05 * expected.abs().max()
        if kwargs['router'] == 'random':
            assert torch.equal(out, ewa.to_dense(model)(images))
        loss = model.train()(images).float().square().sum()
    loss.backward()
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients(model).values())


@pytest.mark.parametrize('kwargs', ROUTERS)
def test_gradient_checkpointing_keeps_the_gradients(moe, images, kwargs):
    results = []
    for checkpointing in (False, True):
        model = moe(init='independent', **kwargs).train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        loss = model(images).square().sum()
        loss = loss + sum(ewa.routing_losses(model).values())
        loss.backward()
        results.append(gradients(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize('kwargs', ROUTERS)
@pytest.mark.parametrize('train', [True, False])
def test_layers_are_leaves_of_fx_feature_extraction(moe, images, kwargs, train):
    model = moe(init='independent', **kwargs).train(train)
    nodes = dict(return_nodes=['blocks.1.mlp', 'head'])
    extractor = create_feature_extractor(model, tracer_kwargs=dict(leaf_modules=list(get_notrace_modules())), **nodes)
    assert isinstance(extractor.get_submodule('blocks.1.mlp'), (RandomPartitionMoE, TopKMoE))
    torch.manual_seed(0)
    expected = model(images)
    torch.manual_seed(0)
    out = extractor(images)
    assert torch.equal(out['head'], expected) and out['blocks.1.mlp'].shape == (3, 17, 32)


@pytest.mark.parametrize('kwargs', ROUTERS)
def test_deepcopy_pickle_and_torch_save(moe, images, kwargs):
    model = moe(init='independent', **kwargs).eval()
    expected = model(images)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for copy in copies:
        assert torch.equal(copy(images), expected)
        with torch.no_grad():
            for p in copy.parameters():
                p.zero_()
    assert torch.equal(model(images), expected)


def test_scripts_as_the_fused_model(moe, images):
    model = moe(init='independent').eval()
    expected = model(images)
    scripted = torch.jit.script(deepcopy(model))
    torch.testing.assert_close(scripted(images), expected)
    assert list(moe_layers(model))


def test_protocol_knows_foreign_layers():
    class Foreign(nn.Module):
        def __init__(self, experts):
            super().__init__()
            self.experts = experts

    assert is_moe(Foreign(nn.ModuleList([nn.Linear(2, 2)])))
    assert not is_moe(Foreign(nn.Linear(2, 2))) and not is_moe(nn.Linear(2, 2))
    model = nn.Sequential(nn.Linear(2, 2), Foreign(nn.ModuleList([nn.Linear(2, 2)])))
    assert [name for name, _ in moe_layers(model)] == ['1']


def test_a_layer_replaced_for_scripting_lives_as_long_as_its_ffn(tiny):
    """torch.jit.script keys what it replaced by id(), which a freed layer would hand on to another module."""
    model = tiny('vit_ewa', host='vit_tiny_patch16_224')
    layer = weakref.ref(model.blocks[1].mlp)
    ffn = layer().__prepare_scriptable__()
    model.blocks[1].mlp = ffn
    gc.collect()
    assert layer() is not None
    del ffn, model
    gc.collect()
    assert layer() is None


class TestPlainWeights:
    """What the parameters do not say is refused, in `eval()`, in `fuse()` and in every conversion."""

    @pytest.mark.parametrize('change, words', REWEIGHTED)
    def test_weights_made_of_others(self, tiny, images, change, words):
        model = ewa.to_moe(tiny(), init='independent')
        layer = model.blocks[1].mlp
        change(layer.experts[1])
        for call in (layer.fuse, lambda: model.eval()(images), lambda: ewa.to_dense(model),
                     lambda: ewa.diagnose(model)):
            with pytest.raises(ValueError, match=words):
                call()
        model.train()(images)  # each expert by itself is what it is

    @pytest.mark.parametrize('change, words', REWEIGHTED)
    def test_in_mean_form(self, tiny, images, change, words):
        model = ewa.to_moe(tiny(), form='mean')
        change(model.blocks[1].mlp.mean)
        for call in (lambda: model.train()(images), lambda: ewa.to_dense(model)):
            with pytest.raises(ValueError, match=words):
                call()
        model = ewa.to_moe(tiny(), form='mean')
        change(model.blocks[1].mlp.deviations[2])
        with pytest.raises(ValueError, match=words):
            model.train()(images)

    @pytest.mark.parametrize('method', METHODS)
    def test_in_gated_layers(self, method):
        change, words = REWEIGHTED[0]
        model = foreign(shared=1)
        change(model.moe.shared[0])
        with pytest.raises(ValueError, match=f'moe: .*{words}'):
            ewa.to_dense(model, method, sequences())

    @pytest.mark.parametrize('change, words', REWEIGHTED[:3])  # an FFN with an adapter is none that is converted
    def test_of_a_host(self, tiny, change, words):
        model = tiny()
        change(model.blocks[1].mlp)
        with pytest.raises(ValueError, match=f'blocks.1.mlp: .*{words}'):
            ewa.to_moe(model)

    def test_a_replica_of_data_parallel(self, tiny, images):
        model = ewa.to_moe(tiny(), init='independent').eval()
        layer = model.blocks[1].mlp
        replica = layer._replicate_for_data_parallel()  # as on each device: modules without parameters
        experts = [expert._replicate_for_data_parallel() for expert in layer.experts]
        for copy, expert in zip(experts, layer.experts):
            for name in ('fc1', 'fc2'):
                linear = getattr(expert, name)._replicate_for_data_parallel()
                linear.weight, linear.bias = getattr(expert, name).weight.detach(), getattr(expert, name).bias.detach()
                copy._modules[name] = linear
        replica.experts = torch.nn.ModuleList(experts)
        with pytest.raises(ValueError, match='has no parameters: .*nn.DataParallel.*DistributedDataParallel'):
            replica(torch.randn(2, 5, 32))

    def test_weights_that_hold_other_tensors(self, tiny):
        quantization = pytest.importorskip('torchao.quantization')
        model = ewa.to_moe(tiny(), init='independent').eval()
        for m in (model, tiny()):
            quantization.quantize_(m, quantization.Int8WeightOnlyConfig())
            with pytest.raises(ValueError, match='blocks.1.mlp: .*packed weights in fc1'):
                (ewa.to_dense if m is model else ewa.to_moe)(m)

    def test_packed_weights(self, tiny):
        model = ewa.to_moe(tiny(), init='independent').eval()
        quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
        with pytest.raises(ValueError, match='blocks.1.mlp: .*packed'):
            ewa.to_dense(quantised)


class TestRoutingLossesThatCantTeach:
    def test_of_another_module_object(self, tiny, images):
        model = gated(tiny()).train()
        copy = deepcopy(model)
        copy(images)
        with pytest.raises(RuntimeError, match='blocks.1.mlp has no routing losses: this module object'):
            ewa.routing_losses(model)
        assert ewa.routing_losses(copy)

    def test_under_reentrant_checkpointing(self, tiny, images):
        model = gated(tiny()).train()
        tokens = torch.randn(2, 5, 32, requires_grad=True)
        for reentrant in (True, False):
            torch.utils.checkpoint.checkpoint(model.blocks[1].mlp, tokens, use_reentrant=reentrant)
            if reentrant:
                with pytest.raises(RuntimeError, match='carry no graph.*use_reentrant=False'):
                    ewa.routing_losses(model.blocks[1])
            else:
                assert ewa.routing_losses(model.blocks[1])['z'].requires_grad

    def test_without_gradients_nothing_is_asked(self, tiny, images):
        model = gated(tiny()).train()
        with torch.no_grad():
            model(images)
            assert not ewa.routing_losses(model)['z'].requires_grad
        model.requires_grad_(False)
        model(images)
        assert ewa.routing_losses(model)


def test_the_dense_ffn_is_trainable_where_any_expert_is(tiny):
    model = ewa.to_moe(tiny(), init='independent')
    model.blocks[1].mlp.experts[0].requires_grad_(False)
    model.blocks[3].mlp.requires_grad_(False)
    for vit in (ewa.to_dense(model), ewa.to_dense(model, 'aligned')):
        assert all(p.requires_grad for p in vit.blocks[1].mlp.parameters())
        assert not any(p.requires_grad for p in vit.blocks[3].mlp.parameters())
