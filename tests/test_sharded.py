"""Several processes: replicated (DDP) and sharded (FSDP2) parameters, on CPUs through gloo."""
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from timm.layers import Mlp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

import ewa
import ewa.moe
from ewa.moe import moe_layers, pulled
from ewa.pull import local
from ewa.sharded import full_state
from runs import FLAGS, HOST, ROOT, close, make_folder, run_convert, summary, weights

STEPS, BATCH, TOKENS, WIDTH = 20, 8, 3, 8
KINDS = {
    'experts': dict(init='independent'),
    'mean': dict(init='independent', form='mean'),
    'gated': dict(init='independent', router='topk'),
}


class Draws:
    """Partitions of the tokens of one or both processes, the same whoever computes: in the place of random ones."""

    def __init__(self, ranks):
        self.ranks, self.calls = ranks, 0

    def __call__(self, num_tokens, num_experts, device=None, static=False):
        self.calls += 1
        count = num_tokens // len(self.ranks)
        size = count // num_experts
        parts = [
            (torch.randperm(count, generator=torch.Generator().manual_seed(2 * self.calls + rank)) + count * i)
            .view(num_experts, size) for i, rank in enumerate(self.ranks)]
        index = torch.cat(parts, dim=1).flatten()
        return index, index.argsort(), [size * len(self.ranks)] * num_experts


def make_model(kind):
    torch.manual_seed(0)
    blocks = nn.Sequential(*(nn.Sequential(nn.LayerNorm(WIDTH), Mlp(WIDTH, 16)) for _ in range(2)))
    return ewa.to_moe(blocks, layers='.', **KINDS[kind]).train()


def train_steps(model, called, images_of, share_rate=.3):
    """Losses of some steps, with the pull watched for communication if there is more than one process."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=.01, eps=1e-4)
    averager = ewa.ExpertAverager(model, share_rate)
    losses = []
    for step in range(STEPS):
        images = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(step))
        loss = called(images_of(images)).square().mean()
        routing = ewa.routing_losses(model)
        if routing:
            loss = loss + .001 * routing['z']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.is_initialized():
            with CommDebugMode() as traffic:
                averager.step()
            assert traffic.get_total_counts() == 0
            dist.all_reduce(loss, op=dist.ReduceOp.SUM)
            loss = loss / dist.get_world_size()
            check_replicas(model)
        else:
            averager.step()
        losses.append(loss.item())
    return losses


def check_replicas(model):
    """What both processes hold in whole is equal to the bit."""
    for _, layer in moe_layers(model):
        for expert in pulled(layer):
            for p in expert.parameters():
                if local(p) is p:
                    both = [torch.empty_like(p) for _ in range(2)]
                    dist.all_gather(both, p.detach())
                    assert torch.equal(*both)


def start(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'file://{folder}/rendezvous', rank=rank, world_size=2)


def end():
    dist.barrier()
    os._exit(0)  # torch's threads of sharded modules now and then abort an orderly end


def train_on_two(rank, folder):
    start(rank, folder)
    mesh = init_device_mesh('cpu', (2,))
    for kind in KINDS:
        expected = torch.load(f'{folder}/{kind}.pt')
        for sharded in (False, True):
            model = make_model(kind)
            called = model if sharded else nn.parallel.DistributedDataParallel(model)
            if sharded:
                for module in (*model, model):
                    fully_shard(module, mesh=mesh)
            ewa.moe.random_partition = Draws([rank])
            losses = train_steps(model, called, lambda images: images.chunk(2)[rank])
            state = full_state(model)
            torch.testing.assert_close(losses, expected['losses'], rtol=1e-5, atol=0)
            if rank == 0:
                assert list(state) == list(expected['state'])
                for key, value in expected['state'].items():
                    torch.testing.assert_close(state[key], value, rtol=1e-4, atol=2e-6)
    end()


def test_two_processes_train_as_one_does_on_both_batches(tmp_path, monkeypatch):
    for kind in KINDS:
        model = make_model(kind)
        draws = Draws([0, 1])
        monkeypatch.setattr(ewa.moe, 'random_partition', draws)
        losses = train_steps(model, model, lambda images: images)
        assert draws.calls == (0 if kind == 'gated' else 2 * STEPS) and losses[-1] < losses[0]
        torch.save(dict(losses=losses, state=model.state_dict()), tmp_path / f'{kind}.pt')
    torch.multiprocessing.spawn(train_on_two, (str(tmp_path),), nprocs=2)


@pytest.mark.parametrize('make', [torch.optim.AdamW, torch.optim.SGD])
def test_the_step_by_which_a_checkpoint_makes_an_optimizer_s_state_is_not_pulled(make):
    model = make_model('experts')
    optimizer = make(model.parameters(), lr=.1)
    averager = ewa.ExpertAverager(model, .3)
    averager.attach(optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = get_optimizer_state_dict(model, optimizer)  # steps, as the optimizer has no state
    set_optimizer_state_dict(model, optimizer, state)
    assert averager.steps == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model(torch.randn(BATCH, WIDTH)).square().mean().backward()
    for group in optimizer.param_groups:
        group['lr'] = 0.  # as a warm-up may begin: a step all the same
    optimizer.step()
    assert averager.steps == 1


def launch(folder, script, *flags, processes=2, **env):
    path = folder / 'launched.py'
    path.write_text(script)
    return subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes), str(path),
         *FLAGS, '--sched', 'constant', '--output', str(folder), *map(str, flags)], capture_output=True, text=True,
        env={**os.environ, 'ACCELERATE_USE_CPU': 'true', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), **env})


REPLICATED = 'import train; train.main()'
# accelerate shards on accelerators only: what `accelerate launch --use_fsdp --fsdp_version 2` sets up there is set here
SHARDED = """
import os, sys
import train
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
make_accelerator = train.make_accelerator
def sharding(args):
    accelerator = make_accelerator(args)
    PartialState._shared_state['distributed_type'] = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy='transformer_based_wrap', cpu_ram_efficient_loading=True,
        state_dict_type='FULL_STATE_DICT')  # by files of accelerate config that were made for FSDP of version 1
    accelerator.state.fsdp_plugin.fsdp_version = VERSION
    return accelerator
train.make_accelerator = sharding
train.main()
sys.stdout.flush()
os._exit(0)
"""
FSDP2 = SHARDED.replace('VERSION', '2')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp('data'), train=8, val=3)


@pytest.mark.slow
@pytest.mark.parametrize('flags', [
    ['--model-ema', '--model-ema-decay', 0.5, '--clip-grad', 1, '--grad-checkpointing'],
    ['--expert-form', 'mean', '--grad-accum-steps', 2],
    ['--router', 'topk'],
], ids=['experts', 'mean', 'gated'])
def test_a_sharded_run_is_the_replicated_one_and_its_folders_are_whole(tmp_path, folder, flags):
    for name, script in (('sharded', FSDP2), ('replicated', REPLICATED)):
        done = launch(tmp_path, script, '--data-dir', folder, '--batch-size', 8, '--experiment', name, *flags)
        assert done.returncode == 0, done.stderr
        assert ('2 x cpu, sharded, ' in done.stdout) == (name == 'sharded')
    rows = [summary(tmp_path / name)[-1] for name in ('sharded', 'replicated')]
    for key in ('eval_top1', 'eval_loss'):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-4)
    for kept in ('last', 'best'):
        models = [ewa.load(tmp_path / name / kept).state_dict() for name in ('sharded', 'replicated')]
        assert all(not hasattr(value, 'to_local') for value in models[0].values())
        assert close(*models, atol=1e-4)
    run_convert(tmp_path / 'sharded' / 'best', '--output', tmp_path / 'vit')


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_if_its_updates_stay(tmp_path, folder):
    # nothing is drawn but the order of the images
    flags = ['--data-dir', folder, '--model', 'vit_tiny_patch16_224', '--no-aug', '--hflip', 0, '--model-kwargs']
    flags += [f'{key}={value}' for key, value in HOST.items()]
    flags += ['--recovery-interval', 3, '--model-ema', '--model-ema-decay', 0.5, '--checkpoint-hist', 9]
    done = launch(tmp_path, FSDP2, *flags, '--batch-size', 8, '--experiment', 'whole')
    assert done.returncode == 0, done.stderr
    expected = weights(tmp_path / 'whole')
    for i, (script, processes, batch_size, accumulated) in enumerate(
            [(FSDP2, 2, 8, 1), (REPLICATED, 2, 8, 1), (REPLICATED, 1, 16, 1), (REPLICATED, 1, 8, 2)]):
        parts = tmp_path / f'parts{i}'
        checkpoint = 'checkpoints/update-00000003'  # within an epoch
        shutil.copytree(tmp_path / 'whole' / checkpoint, parts / checkpoint)
        done = launch(
            tmp_path, script, *flags, '--batch-size', batch_size, '--grad-accum-steps', accumulated, '--experiment',
            parts.name, '--resume', processes=processes)
        assert done.returncode == 0, done.stderr
        assert ('The number of processes is 1 now, it was 2.' in done.stdout) == (processes == 1)
        assert close(weights(parts), expected, atol=1e-4 * (processes == 1), rtol=0)
        rows = [summary(parts)[0], summary(tmp_path / 'whole')[0]]
        for key in ('train_loss', 'eval_loss', 'eval_ema_loss'):
            assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-4)
    done = launch(tmp_path, REPLICATED, *flags, '--batch-size', 8, '--experiment', 'whole', '--resume', '--epochs', 3,
                  processes=1)
    assert done.returncode != 0
    assert 'was trained with 16 images an update (batch_size 8, grad_accum_steps 1, processes 2), here it is 8' in (
        done.stderr)


@pytest.mark.slow
def test_what_can_t_be_sharded_or_is_launched_otherwise_is_refused(tmp_path, folder):
    flags = ['--data-dir', folder, '--batch-size', 8, '--experiment', 'a']
    for script, more, env, message in (
            (FSDP2, ['--clip-grad', 1, '--clip-mode', 'agc'], {}, '--clip-mode agc: gradients that are sharded'),
            (SHARDED.replace('VERSION', '1'), [], {}, 'FSDP of version 1 is not served'),
            (REPLICATED, [], {'ACCELERATE_USE_FSDP': 'true'}, 'accelerate does not shard on cpu')):
        done = launch(tmp_path, script, *flags, *more, **env)
        assert done.returncode != 0 and done.stderr.count('error: ') == 1 and message in done.stderr, done.stderr
        assert not (tmp_path / 'a').exists()
    done = launch(tmp_path, REPLICATED, *flags)
    assert done.returncode == 0
    done = launch(tmp_path, FSDP2, *flags, '--epochs', 3, '--resume')
    assert done.returncode != 0 and 'was saved without FSDP2: go on without it' in done.stderr
