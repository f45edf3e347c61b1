"""student_aware: a language model distilled from a larger one of the same tokenizer.

    total = lm.weight * CE(next token) + kd.weight * T^2 * KL(teacher^T || student^T)      per valid token

Config: `data`, `student` and `teacher` (a Hugging Face folder in `teacher.path`), `lm.smoothing`, `kd.weight` and
`kd.temperature` (ramps; the weight of `lm` is 1 - kd.weight), `train.batch`, `optimizer.weight_decay`.
"""

import jax
import jax.numpy as jnp

from jaxdistill import UserError
from jaxdistill.data import text, tokenizer
from jaxdistill.evaluators import language
from jaxdistill.losses.fused_vocab import fused_vocab_loss
from jaxdistill.models import causal
from jaxdistill.recipe import Aux, Evaluator, Recipe, Schedule, Term, Variables
from jaxdistill.recipes.lm import LMConfig, batches, next_token, student_groups


def make(config) -> Recipe:
    rows = config.data.build(text.TextConfig)
    corpus = text.load(rows)
    sizes = {"vocab": corpus.vocab, "length": rows.length}
    teacher = causal.describe(config.teacher.build(causal.ModelConfig), "teacher", **sizes)
    student = causal.describe(config.student.build(causal.ModelConfig), "student", **sizes)
    check_same_vocabulary(corpus, teacher, student)
    batch, smoothing, decay = config.train.batch, config.lm.build(LMConfig).smoothing, config.optimizer.weight_decay
    kd_weight = Schedule.ramp(config.kd.weight, config.train.steps, "config key kd.weight")
    if not all(0 <= value <= 1 for _, value in kd_weight.knots):
        raise UserError(f"config key kd.weight: found {config.kd.weight}; accepted: values from 0 to 1 (the weight of lm is 1 - it)")
    lm_weight = Schedule(tuple((step, 1.0 - value) for step, value in kd_weight.knots))
    temperature = Schedule.ramp(config.kd.temperature, config.train.steps, "config key kd.temperature")
    if min(value for _, value in temperature.knots) <= 0:
        raise UserError(f"config key kd.temperature: found {config.kd.temperature}; accepted: values above 0")

    def teach(frozen, tokens, layout):
        """The teacher's final states and head: a target, which must not move to meet the student."""
        return jax.lax.stop_gradient(teacher.hidden_and_head(frozen["teacher"], tokens, layout))

    def loss(params, extra, frozen, batch, dials, key):
        tokens, labels, where, layout = next_token(batch)
        hidden, head = student.hidden_and_head(params, tokens, layout)
        total, sums = fused_vocab_loss(
            hidden, head, labels, scale=dials.scale, where=where, smoothing=smoothing,
            teacher=None if kd_weight.off else teach(frozen, tokens, layout),
            temperature=temperature.constant or dials.knobs["temperature"],
        )
        count = jnp.sum(where, dtype=jnp.float32)
        valid = (count, jnp.asarray(where.size, jnp.float32))
        return total, Aux({name: Term(value, count) for name, value in sums.items()}, probes={"valid": valid})

    def measure(params, variables, frozen, batch):
        tokens, labels, where, layout = next_token(batch)
        states = student.hidden_and_head(params, tokens, layout)
        return language.chunked_sums(states, labels, where, frozen["token_bytes"], teach(frozen, tokens, layout))

    def export(params, folder):
        student.save(params, folder, eos=corpus.eos)
        tokenizer.save(corpus.tokenizer, folder)

    return Recipe(
        init=lambda key: Variables(student.init(key)),
        loss=loss,
        weights={"lm": lm_weight, "kd": kd_weight},
        knobs={"temperature": temperature},
        optim_rules=student_groups(decay),
        sharding_rules=student.sharding,
        data=lambda split, seed: batches(corpus, split, batch, seed),
        evaluators={split: Evaluator(split, measure, language.finish) for split in ("validation", "test")},
        frozen=lambda: {"teacher": teacher.init(None), "token_bytes": jnp.asarray(corpus.token_bytes)},
        export=export,
        describe=lambda batch: text.describe(batch, corpus),
        facts={**corpus.facts, "student": student.facts, "teacher": teacher.facts, "parameters": student.parameters},
    )


def check_same_vocabulary(corpus, teacher, student) -> None:
    """Logits can only be compared id by id where both models count the same ids."""
    if not teacher.folder:
        raise UserError("config key teacher.path: found ''; accepted: a local folder with config.json and model.safetensors")
    if teacher.vocab != student.vocab:
        raise UserError(f"config key student: found {student.vocab} ids where the teacher has {teacher.vocab}; accepted: the same")
    theirs = tokenizer.tokenizer_hash(tokenizer.load(teacher.folder))
    ours = tokenizer.tokenizer_hash(corpus.tokenizer)
    if theirs != ours:
        raise UserError(f"config key teacher.path: found tokenizer {theirs[:12]} in {teacher.folder}, and {ours[:12]} on the data; "
                        "accepted: the same tokenizer (set data.tokenizer to the teacher's folder)")
