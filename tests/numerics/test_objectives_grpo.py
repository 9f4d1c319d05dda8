"""GRPO's loss and advantages against the papers' formulas, token by token, and against TRL's trainer where it is."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from coordinator.jobs.rollouts import advantages_of
from edge_node.methods.reward_adapter import RewardAdapter
from edge_node.objectives.grpo import GrpoObjective
from plutino.data.batches import MicroBatchRows
from plutino.job.objective import GrpoConfig, RewardConfig
from tests.numerics.objective_cases import CONFIGS, rows_for
from tests.numerics.pipelines import make_spec, pipeline_of, stages_of, train

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROMPT, ANSWERS, WIDTH, VOCABULARY = 3, (4, 1, 3, 2), 6, 11
CONFIG_BY_NAME = {
    "grpo": GrpoConfig(temperature=0.7, beta=0.3, clip=0.1, max_new_tokens=4),
    "dapo": GrpoConfig(loss="dapo", beta=0.0, clip=0.1, clip_high=0.4, max_new_tokens=4),
    "dr_grpo": GrpoConfig(loss="dr_grpo", beta=0.05, clip=0.2, max_new_tokens=4),
}
WEIGHTS = {"grpo": len(ANSWERS), "dapo": sum(ANSWERS), "dr_grpo": 4 * len(ANSWERS)}


class Case:
    """Hidden states, a head, and rows whose policy has moved away from the one that sampled them."""

    def __init__(self, config, *, sampled_now=False):
        generator = torch.Generator().manual_seed(3)
        self.config = config
        lengths = [PROMPT + answer for answer in ANSWERS]
        self.hidden = torch.randn(len(lengths), max(lengths), WIDTH, generator=generator, requires_grad=True)
        self.head = torch.randn(VOCABULARY, WIDTH, generator=generator)
        ids = torch.randint(0, VOCABULARY, (sum(lengths),), generator=generator).numpy().astype(np.int32)
        self.advantages = torch.randn(len(lengths), generator=generator)
        noise = 0.3 * torch.randn(2, sum(ANSWERS), generator=generator)
        masks = [np.repeat(np.array([0, 1], np.uint8), [PROMPT, answer]) for answer in ANSWERS]
        self.ids = np.split(ids, np.cumsum(lengths)[:-1])
        logps = torch.cat([row[row != 0] for row in self.logps().detach()])
        self.sampled = logps if sampled_now else logps + noise[0]
        self.reference = logps + noise[1]
        self.rows = MicroBatchRows(
            lengths=np.array(lengths, np.int32),
            input_ids=ids,
            label_mask=np.concatenate(masks),
            padded_tokens=max(lengths),
            sample_indices=tuple(range(len(lengths))),
            advantages=self.advantages.numpy(),
            sampled_logps=None if sampled_now else self.sampled.numpy(),
        )

    def logps(self):
        """Of the answers' tokens [B, K], 0 where a row has none."""
        all_logps = torch.log_softmax(self.hidden @ self.head.T / self.config.temperature, dim=-1)
        rows = []
        for row, answer in enumerate(ANSWERS):
            own = [all_logps[row, PROMPT + t - 1, int(self.ids[row][PROMPT + t])] for t in range(answer)]
            rows.append(torch.cat([torch.stack(own), torch.zeros(max(ANSWERS) - answer)]))
        return torch.stack(rows)

    def padded(self, flat):
        parts = torch.split(flat, ANSWERS)
        return torch.stack([torch.cat([part, torch.zeros(max(ANSWERS) - len(part))]) for part in parts])

    def loss(self):
        stage = SimpleNamespace(head=lambda hidden: hidden @ self.head.T)
        reference = self.reference if self.config.beta else None
        return GrpoObjective(self.config).loss(stage, self.hidden, self.rows, WEIGHTS[self.config.loss], reference)


@pytest.mark.parametrize("name", CONFIG_BY_NAME)
@pytest.mark.parametrize("sampled_now", [False, True])
def test_loss_is_the_papers_formula_of_tokens_computed_one_by_one(name, sampled_now):
    config = CONFIG_BY_NAME[name]
    case = Case(config, sampled_now=sampled_now)
    high = config.clip if config.clip_high is None else config.clip_high
    with torch.no_grad():
        logps = case.logps().double()
    sampled, reference = (case.padded(values).double() for values in (case.sampled, case.reference))
    expected, num_clipped, kl_sum = 0.0, 0, 0.0
    for row, answer in enumerate(ANSWERS):
        tokens = []
        for t in range(answer):
            ratio, advantage = math.exp(logps[row, t] - sampled[row, t]), float(case.advantages[row])
            bounded = min(max(ratio, 1 - config.clip), 1 + high)
            above = float(reference[row, t] - logps[row, t])
            kl = math.exp(above) - above - 1
            tokens.append(-min(ratio * advantage, bounded * advantage) + config.beta * kl)
            num_clipped += min(ratio * advantage, bounded * advantage) != ratio * advantage
            kl_sum += kl
        expected += sum(tokens) / (answer if config.loss == "grpo" else 1)

    found = case.loss()

    assert found.sum == pytest.approx(expected, rel=1e-5)
    assert found.scaled.item() == pytest.approx(expected / WEIGHTS[config.loss], rel=1e-5)
    assert (found.counts["num_tokens"], found.counts["num_clipped"]) == (sum(ANSWERS), num_clipped)
    assert config.beta == 0 or found.counts["kl_sum"] == pytest.approx(kl_sum, rel=1e-4)
    # Logits reach 24, where fp32's numbers lie 2e-6 apart; processors multiply and add in different orders.
    np.testing.assert_allclose(found.values_BK.numpy(), case.logps().detach().numpy(), atol=1e-5)
    assert sampled_now or num_clipped


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIG_BY_NAME)
@pytest.mark.parametrize("sampled_now", [False, True])
def test_loss_and_gradient_are_trls_on_the_same_tensors(name, sampled_now):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    config = CONFIG_BY_NAME[name]
    case = Case(config, sampled_now=sampled_now)
    logps = case.logps()
    mask = torch.stack([torch.arange(max(ANSWERS)) < answer for answer in ANSWERS]).long()
    same = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x, gather_for_metrics=lambda x: x)
    fake = SimpleNamespace(
        **dict.fromkeys(("aux_loss_enabled", "use_vllm", "_entropy_bonus_enabled"), False),
        **{"top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "importance_sampling_level": "token"},
        beta=config.beta,
        loss_type=config.loss,
        epsilon_low=config.clip,
        epsilon_high=config.clip if config.clip_high is None else config.clip_high,
        max_completion_length=config.max_new_tokens,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=same,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(len(ANSWERS), PROMPT).long(),
        "prompt_mask": torch.ones(len(ANSWERS), PROMPT).long(),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": case.advantages,
        "old_per_token_logps": None if sampled_now else case.padded(case.sampled),
        "ref_per_token_logps": case.padded(case.reference),
        "num_items_in_batch": mask.sum(),
    }

    expected = trainer._compute_loss(fake, None, inputs)
    found = case.loss()

    assert found.scaled.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    gradients = [torch.autograd.grad(loss, case.hidden, retain_graph=True)[0] for loss in (found.scaled, expected)]
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    clipped = fake._metrics["train"]["clip_ratio/region_mean"][0]
    assert found.counts["num_clipped"] / found.counts["num_tokens"] == pytest.approx(clipped)
    if config.beta:
        kl = fake._metrics["train"]["kl"][0]
        assert found.counts["kl_sum"] / found.counts["num_tokens"] == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_rewards_above_their_groups_mean_in_standard_deviations(scale):
    rewards = {0: 1.0, 1: 0.0, 2: 0.5, 30: 2.0, 31: 2.0, 32: 2.0}
    groups = torch.tensor([[1.0, 0.0, 0.5], [2.0, 2.0, 2.0]], dtype=torch.float64)
    # As TRL has it: Bessel's deviation, and 1e-4 beside it.
    spread = {"group": groups.std(dim=1, keepdim=True) + 1e-4, "batch": groups.std() + 1e-4, "none": 1.0}[scale]
    expected = ((groups - groups.mean(dim=1, keepdim=True)) / spread).flatten()

    found = advantages_of(rewards, GrpoConfig(answers=3, scale=scale))

    assert list(found) == list(rewards)
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-12)
    assert [found[sample] for sample in (30, 31, 32)] == [0.0] * 3


@pytest.mark.parametrize("num_stages", [1, 3])
def test_a_reward_adapter_beside_the_policy_gives_what_it_gave_in_its_own_job(model_dirs, num_stages):
    """Up to fp32's rounding: there peft adds the adapter's share, here a hook on the frozen layer."""
    reward = RewardConfig(labels="ratings")
    rows = [rows_for(reward, 7), rows_for(reward, 8)]
    own = make_spec(model_dirs["llama"], rank=3, alpha=7).model_copy(update={"objective": reward})
    with pipeline_of(own, stages_of(1)) as pipeline:
        train(pipeline, [batch_of(rows)])
        _, expected = pipeline.evaluate_rows(0, rows)
        state = pipeline.state()
        config_json = json.dumps(next(iter(pipeline.executors.values())).method.peft_config())
    config = CONFIGS["grpo"]["sampled before"]
    policy = make_spec(model_dirs["llama"]).model_copy(update={"objective": config})
    with pipeline_of(policy, stages_of(num_stages)) as pipeline:
        for executor in pipeline.executors.values():
            executor.reward_adapter = RewardAdapter(executor.stage, config_json, state)
        sampled = [rows_for(config, 1)]
        untouched = pipeline.evaluate(0, sampled)
        train(pipeline, [batch_of(sampled)])
        before = pipeline.evaluate(1, sampled)

        _, found = pipeline.evaluate_rows(2, rows, by_reward_adapter=True)

        # Neither adapter is left on or off.
        assert pipeline.evaluate(3, sampled) == before != untouched
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def batch_of(rows):
    return SimpleNamespace(rows=rows, loss_weight=float(sum(len(one.lengths) for one in rows)))
