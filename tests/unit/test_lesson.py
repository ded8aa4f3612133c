"""The closed-form first lesson: it solves what is solvable, writes it into the draft, and knows its limits."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from aurora_vllm.learner import induction, lesson, lesson_shape
from aurora_vllm.learner.batch import collate
from aurora_vllm.learner.draft import Eagle3Draft
from aurora_vllm.learner.dual_equations import DualEquations
from aurora_vllm.learner.eagle3_config import Eagle3Config
from aurora_vllm.learner.evaluate import Score, simulate
from aurora_vllm.learner.installation import Solution
from aurora_vllm.learner.lesson import Lesson
from aurora_vllm.learner.normal_equations import NormalEquations
from aurora_vllm.learner.target import TargetHead
from aurora_vllm.learner.trajectory import Trajectory
from aurora_vllm.learner.unroll import plan_unroll, unroll

HIDDEN, VOCAB, HEADS, HEAD_DIM = 128, 400, 8, 32  # four heads hold a value per channel, four are induction heads
CODES = HIDDEN // 8  # channels


def day0_draft(**changes: int) -> tuple[Eagle3Draft, TargetHead]:
    """A draft as day0.py makes them, and a target's head, small and random."""
    generator = torch.Generator().manual_seed(1)
    sizes = {
        "hidden_size": HIDDEN, "intermediate_size": 24, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "head_dim": HEAD_DIM, "vocab_size": VOCAB, "draft_vocab_size": VOCAB - 1, "num_hidden_layers": 1,
        "rms_norm_eps": 1e-6, "num_aux_hidden_states": 3, "target_hidden_size": HIDDEN, "max_position_embeddings": 64,
    } | changes  # fmt: skip
    draft = Eagle3Draft(Eagle3Config.from_hf(sizes))
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        draft.fc.weight.zero_()
        draft.fc.weight[:, -HIDDEN:] = torch.eye(HIDDEN)
        draft.norm.weight.copy_(1.0 + torch.rand(HIDDEN, generator=generator))
        head = torch.randn(VOCAB, HIDDEN, generator=generator)
        draft.lm_head.weight.copy_(head[: VOCAB - 1])
        draft.d2t.zero_()
    return draft, TargetHead(torch.randn(VOCAB, HIDDEN, generator=generator), head)


def linear_world(head: TargetHead, norm: torch.Tensor, count: int, rows: int, seed: int = 0) -> list[Trajectory]:
    """Traffic of a target whose next state is a linear function of its last one and the next token."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(9))).Q
    lens = torch.randn(HIDDEN, 3 * HIDDEN, generator=torch.Generator().manual_seed(8))
    done = []
    for request in range(count):
        state = torch.randn(HIDDEN, generator=generator)
        tokens, states = [int(torch.randint(VOCAB - 1, (1,), generator=generator))], []
        for _ in range(rows):
            embedding = head.embed(torch.tensor(tokens[-1]))
            state = 0.6 * F.normalize(state, dim=0) @ mix + 0.8 * F.normalize(embedding, dim=0)
            state = F.normalize(state, dim=0) * HIDDEN**0.5
            states.append(state)
            tokens.append(int((head.lm_head[: VOCAB - 1] @ (state * norm)).argmax()))
        y = torch.stack(states)
        done.append(Trajectory(request, 0, torch.tensor(tokens[:-1]), y @ lens, y * norm, 2, 1, 0.0, tokens[-1]))
    return done


def acceptance(draft: Eagle3Draft, head: TargetHead, trajectories: list[Trajectory]) -> float:
    return sum((simulate(draft, head, one, 3) for one in trajectories), Score(0, (0, 0, 0))).acceptance_length


def teach(draft: Eagle3Draft, head: TargetHead, trajectories: list[Trajectory]) -> int:
    return sum(1 for _ in Lesson(draft, head).run(trajectories))


def test_what_is_linear_is_learned_in_one_lesson() -> None:
    draft, head = day0_draft()
    norm = draft.norm.weight.detach().clone()
    unseen = linear_world(head, norm, 8, 30, seed=77)
    before = acceptance(draft, head, unseen)
    teach(draft, head, linear_world(head, norm, 40, 30))
    after = acceptance(draft, head, unseen)
    assert before < 1.3 and after > 1.8


@pytest.mark.parametrize("below", [0.0, 99.0])
def test_attention_sinks_spoil_no_lesson(monkeypatch: pytest.MonkeyPatch, below: float) -> None:
    """Where a sequence begins a target's states are hundreds of times as large, the same in every one."""
    monkeypatch.setattr(lesson, "DUAL_BELOW", below)
    draft, head = day0_draft()
    norm = draft.norm.weight.detach().clone()
    sink = 600 * torch.randn(3 * HIDDEN, generator=torch.Generator().manual_seed(3)) * HIDDEN**0.5
    traffic, unseen = linear_world(head, norm, 200, 6), linear_world(head, norm, 8, 30, seed=77)
    for one in traffic + unseen:
        one.aux[0] = sink
    teach(draft, head, traffic)
    assert acceptance(draft, head, unseen) > 1.5


def test_states_that_are_not_finite_are_left_out() -> None:
    made = []
    for broken in (False, True):
        draft, head = day0_draft()
        traffic = linear_world(head, draft.norm.weight.detach().clone(), 10, 20)
        if broken:
            traffic[3].aux[5, 7], traffic[6].last[2, 1] = torch.nan, torch.inf
        else:
            del traffic[6], traffic[3]
        teach(draft, head, traffic)
        made.append(draft.state_dict())
    for name, weight in made[0].items():
        assert torch.equal(weight, made[1][name]), name


def test_a_lesson_without_a_solution_leaves_the_draft_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lesson, "_split_up", lambda *_: Solution(*[torch.full((2, 2), torch.inf)] * 4))
    monkeypatch.setattr(Lesson, "_guesses", lambda *_: iter(()))
    monkeypatch.setattr(Lesson, "_copying_helps", lambda *_: True)
    draft, head = day0_draft()
    before = copy.deepcopy(draft.state_dict())
    with pytest.raises(RuntimeError, match="not finite"):
        teach(draft, head, linear_world(head, draft.norm.weight.detach().clone(), 10, 20))
    assert all(torch.equal(weight, before[name]) for name, weight in draft.state_dict().items())


def test_both_forms_of_the_regression_make_the_same_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    made, forms = [], []
    for below, form in ((0.0, NormalEquations), (99.0, DualEquations)):
        monkeypatch.setattr(lesson, "DUAL_BELOW", below)
        draft, head = day0_draft()
        head = TargetHead(head.lm_head, head.lm_head)
        teacher = Lesson(draft, head)
        equations = teacher._equations
        monkeypatch.setattr(teacher, "_equations", lambda *a, of=equations: forms.append(of(*a)) or forms[-1])
        for _ in teacher.run(repetitive_world(head, draft.norm.weight.detach().clone(), 12, seed=0)):
            pass
        assert isinstance(forms[-1], form)
        weights = {name: weight.float() for name, weight in draft.state_dict().items()}
        value, output = (weights.pop(f"midlayer.self_attn.{name}_proj.weight") for name in "vo")
        made.append(weights | {"value and output": output @ value})  # which direction goes through which head is free
    assert (made[0]["norm.weight"] == 0).any()  # with copying
    for name, weight in made[0].items():
        assert float((weight - made[1][name]).norm()) <= 2e-3 * float(weight.norm()), name


@pytest.mark.parametrize(("copying", "heads"), [(False, HEADS), (False, HEADS // 2), (True, HEADS)])
def test_the_draft_computes_the_solution_step_by_step(
    monkeypatch: pytest.MonkeyPatch, copying: bool, heads: int
) -> None:
    """The layer, unrolled, gives the guesses that the regression was solved for."""
    monkeypatch.setattr(Lesson, "_copying_helps", lambda *_: copying)
    draft, head = day0_draft(num_attention_heads=heads, num_key_value_heads=heads)
    norm = draft.norm.weight.detach().clone()
    kept: list[Solution] = []
    install = Lesson._install
    monkeypatch.setattr(Lesson, "_install", lambda self, *found: (kept.append(found[0]), install(self, *found)))
    trajectories = linear_world(head, norm, 40, 30)
    teacher = Lesson(draft, head)
    for _ in teacher.run(trajectories):
        pass
    one = trajectories[0]
    features = teacher._features([one])
    count = len(features.aux)
    expected = list(teacher._guesses(kept[0], features, 3))
    counts = torch.zeros(1, len(one.token_ids) + 1, dtype=torch.bool)
    counts[0, 1:] = True
    plan = plan_unroll(counts, 3)
    with torch.no_grad():
        outputs = unroll(draft, head, collate([one]), plan, 3).outputs
    for step, (output, guess) in enumerate(zip(outputs, expected, strict=True)):
        # Not exact: attention leaks a little to other rows, and one radius stands for all rows' in the first step.
        seen = draft.norm.weight != 0  # the other channels hold codes
        assert int(seen.sum()) == HIDDEN - (CODES if copying else 0)
        similarity = F.cosine_similarity(output[:count, seen], guess[:, seen], dim=-1)
        assert float(similarity.median()) > 0.985, step


def repetitive_world(head: TargetHead, norm: torch.Tensor, count: int, seed: int) -> list[Trajectory]:
    """Traffic of a target that says the same random words over and over: nothing to know but what was said before."""
    generator = torch.Generator().manual_seed(seed)
    lens = torch.randn(2 * HIDDEN, 3 * HIDDEN, generator=torch.Generator().manual_seed(8)) / HIDDEN**0.5
    done = []
    for request in range(count):
        words = torch.randperm(VOCAB - 1, generator=generator)[:12].repeat(4)
        here = F.normalize(head.embed(words[1:-1]), dim=1)
        aux = torch.cat([here, F.normalize(head.embed(words[:-2]), dim=1)], 1) @ lens
        last = F.normalize(head.lm_head[words[2:]] / norm, dim=1) * HIDDEN**0.5 * norm
        done.append(Trajectory(request, 0, words[1:-1], aux, last, 14, 1, 0.0, int(words[-1])))
    return done


@pytest.mark.parametrize("blind", [False, True])
def test_what_was_said_before_is_copied(monkeypatch: pytest.MonkeyPatch, blind: bool) -> None:
    for name in ("MATCH",) if blind else ():  # heads that match nothing bring an average
        monkeypatch.setattr(induction, name, 0.0)
    draft, head = day0_draft()
    head = TargetHead(head.lm_head, head.lm_head)  # tied, so that a word's embedding says what its state would be
    norm = draft.norm.weight.detach().clone()
    teach(draft, head, repetitive_world(head, norm, 80, seed=0))
    length = acceptance(draft, head, repetitive_world(head, norm, 8, seed=77))
    assert length < 1.5 if blind else length > 3.0


def unevenly(world: list[Trajectory], norm: torch.Tensor) -> list[Trajectory]:
    """The same traffic, but states differ in size: along one more direction, by how much no token tells."""
    in_aux, in_state = (torch.randn(n, generator=torch.Generator().manual_seed(5)) for n in (3 * HIDDEN, HIDDEN))
    done = []
    for one in world:
        amount = 1.5 * torch.rand(len(one.token_ids), 1, generator=torch.Generator().manual_seed(one.request))
        last = one.last.clone()
        last[1:] += amount[:-1] * in_state * norm
        done.append(dataclasses.replace(one, aux=one.aux + amount * in_aux / 8, last=last))
    return done


@pytest.mark.parametrize("quiet", [False, True])
def test_attention_does_not_prefer_small_states(monkeypatch: pytest.MonkeyPatch, quiet: bool) -> None:
    for module in (induction, lesson) if quiet else ():  # with codes that leave a state's size as it is
        monkeypatch.setattr(module, "LOUDNESS", 0.1)
    draft, head = day0_draft()
    head = TargetHead(head.lm_head, head.lm_head)
    norm = draft.norm.weight.detach().clone()
    teach(draft, head, unevenly(repetitive_world(head, norm, 80, seed=0), norm))
    length = acceptance(draft, head, unevenly(repetitive_world(head, norm, 8, seed=77), norm))
    assert length < 3.0 if quiet else length > 3.2


def test_induction_heads_stay_silent_where_copying_does_not_help() -> None:
    own = HIDDEN  # columns of the heads that hold a value per channel
    silent, head = day0_draft()
    keys = silent.midlayer.self_attn.k_proj.weight[own:].detach().clone()
    teach(silent, head, linear_world(head, silent.norm.weight.detach().clone(), 40, 30))
    attn = silent.midlayer.self_attn
    assert attn.o_proj.weight[:, :own].any() and not attn.o_proj.weight[:, own:].any()
    assert torch.equal(attn.k_proj.weight[own:], keys)  # as day 0 made them: gradient steps can wake them
    assert bool((silent.norm.weight != 0).all())  # nor do codes take channels
    copying, head = day0_draft()
    head = TargetHead(head.lm_head, head.lm_head)
    teach(copying, head, repetitive_world(head, copying.norm.weight.detach().clone(), 80, seed=0))
    assert copying.midlayer.self_attn.o_proj.weight[:, own:].any()
    assert int((copying.norm.weight == 0).sum()) == CODES


def test_a_lesson_may_leave_induction_heads_out() -> None:
    with_heads, head = day0_draft()
    without, _ = day0_draft()
    norm = without.norm.weight.detach().clone()
    world = repetitive_world(head, norm, 60, 0)
    teach(with_heads, head, world)
    for _ in Lesson(without, head, induction=False).run(world):
        pass
    own = without.config.hidden_size
    assert bool((without.midlayer.self_attn.o_proj.weight[:, own:] == 0).all())
    unseen = repetitive_world(head, norm, 20, 1)
    assert acceptance(with_heads, head, unseen) > acceptance(without, head, unseen) + 0.25


def test_a_later_lesson_may_decide_otherwise() -> None:
    draft, head = day0_draft()
    norm = draft.norm.weight.detach().clone()
    linear, repetitive = linear_world(head, norm, 40, 30), repetitive_world(head, norm, 80, seed=0)
    teacher = Lesson(draft, head)
    lengths = []
    for world in (linear, repetitive, linear, repetitive, linear):
        for _ in teacher.run(world):
            pass
        assert draft.midlayer.self_attn.o_proj.weight[:, HIDDEN:].any() == (world is repetitive)
        lengths.append((acceptance(draft, head, linear[:8]), acceptance(draft, head, repetitive[:8])))
    assert lengths[0][0] > 1.8 and lengths[0][1] < 1.2 and lengths[1][0] < 1.2 and lengths[1][1] > 1.7
    # What one lesson takes from lm_head, to make room for codes, the next one gives back.
    assert lengths[4] == lengths[2] == lengths[0] and lengths[3] == lengths[1]


def test_what_lm_head_was_taught_outlasts_a_lesson() -> None:
    draft, head = day0_draft()
    norm = draft.norm.weight.detach().clone()
    teacher = Lesson(draft, head)
    for world in (repetitive_world(head, norm, 80, seed=0), repetitive_world(head, norm, 80, seed=1)):
        with torch.no_grad():
            draft.lm_head.weight += 0.1 * torch.randn(draft.lm_head.weight.shape)
        made = draft.lm_head.weight @ teacher._readout._reads.T  # of the target's states
        made += (head.lm_head[draft.target_ids] * norm) @ teacher._readout._unread @ teacher._readout._unread.T
        for _ in teacher.run(world):
            pass
        assert teacher._readout._unread.shape == (HIDDEN, CODES)
        made -= made @ teacher._readout._unread @ teacher._readout._unread.T
        torch.testing.assert_close(draft.lm_head.weight @ teacher._readout._reads.T, made, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("told", [True, False])
def test_a_lesson_for_a_draft_that_went_back_to_other_weights(told: bool) -> None:
    draft, head = day0_draft()
    norm, day0 = draft.norm.weight.detach().clone(), copy.deepcopy(draft.state_dict())
    world = repetitive_world(head, norm, 80, seed=0)
    teacher = Lesson(draft, head)
    for _ in teacher.run(world):
        pass
    length = acceptance(draft, head, world[:8])
    draft.load_state_dict(day0)
    if told:
        teacher.start_over()
    for _ in teacher.run(world):
        pass
    again = acceptance(draft, head, world[:8])
    assert again == length > 1.7 if told else again < 1.2  # or it reads what it is to turn as turned already


def test_a_draft_without_induction_heads_gets_its_lesson_too() -> None:
    """As day 0 made them before there were any, and as it makes them where they have no room."""
    draft, head = day0_draft(num_attention_heads=HEADS // 2, num_key_value_heads=HEADS // 2)
    norm = draft.norm.weight.detach().clone()
    assert lesson_shape.is_due(draft)
    teach(draft, head, linear_world(head, norm, 40, 30))
    assert acceptance(draft, head, linear_world(head, norm, 8, 30, seed=77)) > 1.8


def test_is_due_only_for_an_untaught_day0_draft() -> None:
    draft, head = day0_draft()
    assert lesson_shape.is_due(draft)
    teach(draft, head, linear_world(head, draft.norm.weight.detach().clone(), 10, 20))
    assert not lesson_shape.is_due(draft)
    grouped, _ = day0_draft(num_key_value_heads=1)
    assert not lesson_shape.is_due(grouped)  # values have no room
    trained, _ = day0_draft()
    with torch.no_grad():
        trained.fc.weight[0, 0] = 0.01
    assert not lesson_shape.is_due(trained)


def test_nothing_to_learn_from_changes_nothing() -> None:
    draft, head = day0_draft()
    before = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    short = [dataclasses.replace(one) for one in linear_world(head, draft.norm.weight.detach().clone(), 3, 3)]
    assert teach(draft, head, short) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in draft.state_dict().items())


def test_the_draft_stays_as_it_was_until_the_last_piece() -> None:
    draft, head = day0_draft()
    run = Lesson(draft, head).run(linear_world(head, draft.norm.weight.detach().clone(), 20, 20))
    before = draft.fc.weight.detach().clone()
    pieces = 0
    for _ in run:
        pieces += 1
        assert torch.equal(draft.fc.weight, before)
    # To prepare, to judge induction heads, to eliminate what stays the same; in each round two pieces, and to solve.
    assert pieces == 3 + 3 * lesson.STEPS and not torch.equal(draft.fc.weight, before)
