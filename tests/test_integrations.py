"""Callbacks for the loops of other libraries, each held to the plain loop."""
import json
from itertools import cycle

import pytest
import torch
from torch import nn

import ewa
import reference
from ewa.moe import moe_layers

STEPS, RATE = 6, .1


def dataset(images=12):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(3, 32, 32, generator=generator), i % 10) for i in range(images)]


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal(first, second):
    assert list(first) == list(second)
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=1e-5, atol=1e-6, msg=key)


class TestLightning:
    @pytest.fixture
    def make(self, tiny, tmp_path):
        lightning = pytest.importorskip('lightning.pytorch')
        from ewa.integrations.lightning import EWACallback

        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.net = ewa.to_moe(tiny(depth=2))

            def training_step(self, batch, index):
                torch.manual_seed(100 + self.global_step)  # of the partition, also after a resume
                images, target = batch
                return nn.functional.cross_entropy(self.net(images), target)

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=.1)

        def make(max_steps, **kwargs):
            callback = EWACallback(RATE, schedule='linear', total_steps=STEPS, **kwargs)
            trainer = lightning.Trainer(
                max_steps=max_steps, accelerator='cpu', default_root_dir=tmp_path, logger=False,
                callbacks=[callback, lightning.callbacks.ModelCheckpoint(
                    tmp_path / 'run', '{epoch}', save_top_k=-1, save_on_train_epoch_end=True)],
                enable_progress_bar=False, enable_model_summary=False)
            return Module(), trainer, callback

        return make

    @pytest.fixture
    def loader(self):
        return torch.utils.data.DataLoader(dataset(4), batch_size=4)  # a step an epoch

    def test_pulls_as_the_plain_loop_does(self, make, loader):
        module, trainer, callback = make(STEPS)
        other = make(STEPS)[0]
        trainer.fit(module, loader)
        optimizer = torch.optim.SGD(other.parameters(), lr=.1)
        averager = ewa.ExpertAverager(other, RATE, schedule='linear', total_steps=STEPS)
        averager.attach(optimizer)
        other.train()
        for step, (images, target) in zip(range(STEPS), cycle(loader)):
            torch.manual_seed(100 + step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(other.net(images), target).backward()
            optimizer.step()
        assert_equal(weights(module), weights(other))
        assert callback.averager.steps == trainer.global_step == STEPS
        assert trainer.callback_metrics['ewa/share_rate'] == pytest.approx(RATE)
        assert trainer.callback_metrics['ewa/distance'] > 0

    def test_a_resumed_run_ends_where_it_would_have_ended(self, make, loader, tmp_path):
        whole, trainer, _ = make(STEPS)
        trainer.fit(whole, loader)
        second, trainer, callback = make(STEPS)
        trainer.fit(second, loader, ckpt_path=tmp_path / 'run' / 'epoch=2.ckpt')
        assert trainer.callback_metrics['ewa/share_rate'] == pytest.approx(RATE)
        assert callback.averager.state_dict() == dict(steps=STEPS, pulls=STEPS)
        assert_equal(weights(second), weights(whole))

    def test_the_optimizer_that_holds_the_experts_is_taken(self, make):
        module, trainer, callback = make(1)
        trainer.strategy.optimizers = [torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.),
                                       torch.optim.SGD(module.parameters(), lr=1.)]
        callback.on_train_start(trainer, module)
        assert trainer.optimizers[1]._optimizer_step_post_hooks and not trainer.optimizers[0]._optimizer_step_post_hooks
        callback.on_train_end(trainer, module)
        assert not trainer.optimizers[1]._optimizer_step_post_hooks
        trainer.strategy.optimizers = trainer.optimizers[:1]
        with pytest.raises(ValueError, match='The optimizer holds 0 of'):
            callback.on_train_start(trainer, module)


class TestTrainer:
    @pytest.fixture
    def make(self, tmp_path):
        transformers = pytest.importorskip('transformers')
        from ewa.integrations.transformers import EWACallback

        class Trainer(transformers.Trainer):
            def training_step(self, *args, **kwargs):
                torch.manual_seed(100 + self.state.global_step)
                return super().training_step(*args, **kwargs)

        def make(max_steps, **kwargs):
            torch.manual_seed(0)
            config = transformers.ViTConfig(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32,
                patch_size=8, num_labels=10, hidden_dropout_prob=0.)
            model = ewa.to_moe(transformers.ViTForImageClassification(config))
            arguments = transformers.TrainingArguments(
                str(tmp_path / 'run'), max_steps=max_steps, per_device_train_batch_size=4, learning_rate=.1,
                optim='sgd', lr_scheduler_type='constant', logging_steps=1, save_steps=3, report_to='none',
                use_cpu=True, disable_tqdm=True, max_grad_norm=0., **kwargs)
            callback = EWACallback(RATE, schedule='linear', total_steps=STEPS)
            return Trainer(
                model, arguments, train_dataset=dataset(), callbacks=[callback],
                data_collator=lambda items: dict(pixel_values=torch.stack([image for image, _ in items]),
                                                 labels=torch.tensor([label for _, label in items]))), callback

        return make

    @pytest.mark.filterwarnings('ignore:.*has MoE layers')
    @pytest.mark.parametrize('restore', [False, True])
    def test_a_resumed_run_ends_where_it_would_have_ended(self, make, tmp_path, restore):
        whole, callback = make(STEPS, restore_callback_states_from_checkpoint=restore)
        whole.train()
        assert callback.averager.state_dict() == dict(steps=STEPS, pulls=STEPS)
        rates = [entry['ewa/share_rate'] for entry in whole.state.log_history if 'ewa/share_rate' in entry]
        assert rates == pytest.approx([RATE * min(step, STEPS) / STEPS for step in range(2, STEPS + 2)])
        second, _ = make(STEPS, restore_callback_states_from_checkpoint=restore)
        second.train(resume_from_checkpoint=str(tmp_path / 'run' / 'checkpoint-3'))
        callback, = [c for c in second.callback_handler.callbacks if type(c).__name__ == 'EWACallback']
        assert callback.averager.state_dict() == dict(steps=STEPS, pulls=STEPS)
        assert_equal(weights(second.model), weights(whole.model))
        state = json.loads((tmp_path / 'run' / 'checkpoint-3' / 'trainer_state.json').read_text())
        assert state['stateful_callbacks']['EWACallback']['attributes']['position'] == dict(steps=3, pulls=3)

    @pytest.mark.filterwarnings('ignore:.*has MoE layers')
    def test_pulls_as_the_plain_loop_does(self, make):
        trainer, _ = make(2)
        other = make(2)[0].model.train()
        steps = list(trainer.get_train_dataloader())[:2]
        trainer.get_train_dataloader = lambda: steps
        trainer.train()
        rates = [RATE * (t + 1) / STEPS for t in range(2)]
        for t, (batch, rate) in enumerate(zip(steps, rates)):
            torch.manual_seed(100 + t)
            other.zero_grad()
            other(**batch).loss.backward()
            with torch.no_grad():
                for p in other.parameters():
                    p -= .1 * p.grad
            reference.pull_layers([layer for _, layer in moe_layers(other)], rate)
        assert_equal(weights(trainer.model), weights(other))
