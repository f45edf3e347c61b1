"""student_aware: a language model distilled from a larger one, whatever its width, depth, vocabulary and tokenizer.

    total = lm.weight          * CE(next token)
          + kd.weight          * T^2 KL(teacher^T || student^T), or another divergence; or spans (alm), or ranks (uld)
          + hidden.weight      * distance of the student's blocks, projected, to the teacher's            per valid token
          + attention.weight   * KL of attention rows                                                     per query
          + router.weight      * distance to what the router picks of the teacher's features              per valid token
          + contrastive.weight * InfoNCE of pooled final states over the global batch                     per example
          + projector.weight   * CE(next token) of the projected teacher: the projector's own anchor      per aligned token

Each section of the config is one of the Config classes below or in models.matching and models.projector. Weights and knobs are
ramps over the updates. A term whose weight is always 0 is left out of the program, with its parameters; `lm` weighs what `kd`
leaves of 1. The next token of a document's last one is the end of text, so that a student learns to stop; evaluation leaves it out:
bits per byte are those of the text.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill import UserError
from jaxdistill.data import text, tokenizer
from jaxdistill.evaluators import language
from jaxdistill.losses import cross_tokenizer
from jaxdistill.losses.contrastive import info_nce
from jaxdistill.losses.divergences import KINDS
from jaxdistill.losses.fused_vocab import fused_vocab_loss
from jaxdistill.losses.targets import MIXTURES
from jaxdistill.models import causal, matching, projector
from jaxdistill.recipe import Aux, Evaluator, Recipe, Rest, Schedule, Term, Variables, on_host, while_on
from jaxdistill.recipes import on_policy, reactions, storing, teachers
from jaxdistill.recipes.lm import LMConfig, groups, next_token, share, told
from jaxdistill.recipes.options import Needs, note_unused

MODES = ("logits", "projector", "alm", "uld")
NEEDS = (
    Needs("kd.kind", ("jsd",), ("kd.beta",)),
    Needs("kd.kind", ("skew_kl", "skew_reverse_kl"), ("kd.alpha",)),
    Needs("kd.kind", ("topk_kl",), ("kd.top_k",)),
    Needs("kd.mode", ("logits", "projector"), ("kd.kind", "kd.temperature", "kd.beta", "kd.alpha", "kd.top_k")),
    Needs("kd.mode", ("alm",), ("kd.tau",)),
    Needs("kd.mode", ("projector",), tuple(f"projector.{field.name}" for field in dataclasses.fields(projector.ProjectorConfig))),
    Needs("on_policy.fraction", (), ("on_policy.prompt", "on_policy.temperature", "on_policy.top_p")),
)


@dataclasses.dataclass(frozen=True)
class KDConfig:
    """The section `kd`. mode: what is compared: logits (of one tokenizer), logits of the projected teacher, likelihoods of
    aligned spans (alm), sorted probabilities (uld). kind, beta, alpha, top_k: of the divergence (losses.divergences). tau: of alm.
    teacher_weights, mixture: of several teachers (losses.targets.Mixture); (): equal ones."""

    weight: Any = ((0.0, 0.9),)
    temperature: Any = ((0.0, 1.0),)
    mode: str = "logits"
    kind: str = "forward_kl"
    beta: float = 0.5
    alpha: float = 0.1
    top_k: int = 64
    tau: float = 100.0
    teacher_weights: tuple = ()
    mixture: str = "probabilities"

    def __post_init__(self):
        for key, accepted in (("mode", MODES), ("kind", KINDS), ("mixture", MIXTURES)):
            if getattr(self, key) not in list(accepted):
                raise UserError(f"config key kd.{key}: found {getattr(self, key)!r}; accepted: {', '.join(accepted)}")
        for key in ("beta", "alpha"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"config key kd.{key}: found {getattr(self, key)}; accepted: values from 0 to 1")
        if self.top_k < 1:
            raise UserError(f"config key kd.top_k: found {self.top_k}; accepted: 1 or more")
        if not self.tau > 0:
            raise UserError(f"config key kd.tau: found {self.tau}; accepted: a number above 0")


def make(config) -> Recipe:
    rows = config.data.build(text.TextConfig)
    steps, batch_size, decay = config.train.steps, config.train.batch, config.optimizer.weight_decay
    smoothing, kd = config.lm.build(LMConfig).smoothing, config.kd.build(KDConfig)
    project = config.section("projector").build(projector.ProjectorConfig)
    features = {name: config.section(name).build(kind) for name, kind in matching.CONFIGS.items()}
    react = config.section("react").build(reactions.ReactConfig)
    ramp = lambda key, points, **bounds: Schedule.ramp(points, steps, f"config key {key}", **bounds)  # noqa: E731
    kd_weight = ramp("kd.weight", kd.weight, least=0.0, most=1.0)
    anchor = Schedule(((0.0, 0.0 if kd_weight.off or kd.mode != "projector" else project.weight),))
    weights = {"lm": Rest("kd"), "kd": kd_weight} | ({} if anchor.off else {"anchor": anchor})
    weights |= {name: ramp(f"{name}.weight", features[name].weight, least=0.0) for name in features}
    on = tuple(name for name in features if not weights[name].off)
    weights |= {f"{name}_balance": weights[name].times(features[name].balance) for name in ("hidden", "router") if name in on}
    temperature = ramp("kd.temperature", kd.temperature, least=1e-3)
    knobs = {"temperature": temperature}
    if "router" in on:
        knobs |= {"router_k": ramp("router.k", features["router"].k, least=1.0),
                  "router_temperature": ramp("router.temperature", features["router"].temperature, least=1e-3)}

    # The student, the teacher, and what lies between them.
    student = causal.describe(config.student.build(causal.ModelConfig), "student", vocab=text.load(rows).vocab, length=rows.length)
    teacher = teachers.choose(config, rows, kd, temperature=temperature, terms=on, wanted=bool(on) or not kd_weight.off)
    corpus, at_places = teacher.corpus, teacher.at_places
    written = config.section("on_policy").build(on_policy.OnPolicyConfig)
    sampler = on_policy.sampler(written, student, teacher, steps=steps, length=rows.length, mode=kd.mode, kd_weight=kd_weight)
    note_unused(config, NEEDS, kd=kd, projector=project, on_policy=written)
    if not config.teacher.build(teachers.TeacherConfig).several:
        config.leave("kd.mixture", KDConfig.mixture, "with one teacher, which does not use it (several in teacher.path do)")
    if "contrastive" in on and batch_size < 8:
        raise UserError(f"config key train.batch: found {batch_size} with a contrastive term; accepted: 8 examples or more")
    into_student = projector.Projector(student.width, project.kind, project.init, student.dtype)
    match = matching.Matching(
        terms=on, depth=student.depth, teacher_depth=teacher.depth, width=teacher.width, heads=student.heads, attend=not teacher.paired,
        distance=features["hidden"].distance, kind=features["hidden"].projector, experts=teacher.experts[-1:], dtype=student.dtype,
    )

    def init(key):
        params = {"student": student.init(key)}
        if not anchor.off:
            params["projector"] = into_student.init(jax.random.fold_in(key, 1), jnp.zeros((1, teacher.width)))["params"]
        if on:
            example = student.example(), teacher.example(), jnp.ones((1, 2), bool)
            params["match"] = jax.jit(match.init)(jax.random.fold_in(key, 2), *example).get("params", {})
        return Variables(params)

    def frozen(place):
        return {"token_bytes": jnp.asarray(corpus.token_bytes)} | teacher.load(place)

    def loss(params, extra, frozen, batch, dials, key):
        tokens, labels, where, layout = next_token(batch, corpus.eos)
        ours, head = student.features(params["student"], tokens, layout)
        terms, shares, kd_terms = {}, [], {}
        probes = {"valid": share(where)}
        given = temperature.constant or dials.knobs["temperature"]
        labelled, taught = on_policy.masks(batch, where) if sampler else (where, None)
        if not kd_weight.off or on:
            theirs, target = teacher.outputs(frozen, batch, given)

        # Logits: cross-entropy, and the teacher's distribution where there is one for the same ids.
        if not kd_weight.off:
            if kd.mode == "logits":
                kd_terms = {"teacher": target, "kd_where": taught}
            elif kd.mode == "projector":
                states, aligned = at_places(batch, theirs["final"])
                states = into_student.apply({"params": params["projector"]}, states)
                known = where & aligned
                fixed, anchored = jax.lax.stop_gradient(head), {"lm": dials.scale["anchor"]}
                part, found = fused_vocab_loss(states, fixed, labels, where=known, scale=anchored, vocab=corpus.vocab)[:2]
                shares, terms["anchor"] = [part], found["lm"]
                kd_terms = {"teacher": (states, head), "kd_where": known}
            else:
                compare = _spans if kd.mode == "alm" else _ranks
                values, counted = compare(kd, batch, (ours["final"], head, corpus.vocab), (*target, teacher.vocab), at_places)
                terms["kd"] = Term(jnp.sum(values), jnp.sum(counted, dtype=jnp.float32))
                shares = [dials.scale["kd"] * terms["kd"].sum]
        total, found, seen = fused_vocab_loss(
            ours["final"], head, labels, where=labelled, smoothing=smoothing, vocab=corpus.vocab,
            scale={name: dials.scale[name] for name in (("lm", "kd") if kd_terms else ("lm",))},
            temperature=given, kind=kd.kind, beta=kd.beta, alpha=kd.alpha, top_k=kd.top_k, probe=dials.probing, **kd_terms,
        )
        terms, probes = terms | found, probes | seen

        # The insides: each term for each token, and nothing computed while its ramp is at 0.
        stats = {}
        if on:
            valid = (layout["segments"] > 0) & batch["valid"][:, None]
            if teacher.paired:
                valid = valid & at_places(batch, theirs["final"])[1]
                theirs = {name: at_places(batch, states)[0] for name, states in theirs.items() if not name.startswith("attention")}
        for name in on:
            options = {}
            if name == "router":
                options = {"k": dials.knobs["router_k"], "temperature": dials.knobs["router_temperature"], "key": key}
            compute = functools.partial(match.apply, {"params": params["match"]}, ours, theirs, valid, method=name, **options)
            values, more, seen = while_on(weights[name], dials.scale[name], compute)
            stats, probes = stats | more, probes | seen
            if values is not None:
                terms[name] = Term(jnp.sum(values), jnp.sum(valid, dtype=jnp.float32))
                shares.append(dials.scale[name] * terms[name].sum)
        if stats:
            stats["tokens"] = jnp.sum(valid, axis=1, dtype=jnp.float32)
        return sum(shares, total), Aux(terms, stats, probes)

    def whole(params, extra, stats, knobs):
        """What is a function of the whole batch, or of no data at all."""
        one, terms = jnp.ones((), jnp.float32), {}
        if "hidden" in on:
            terms["hidden_balance"] = Term(match.apply({"params": params["match"]}, method="layer_balance"), one)
        if "router" in on:
            balance = matching.load_balance(stats["routing"], stats["tokens"])
            terms["router_balance"] = Term(jnp.where(jnp.any(stats["routing"] != 0), balance, 0.0), one)  # 0 while it is closed
        if "contrastive" in on:
            there = stats["tokens"] > 0
            values = info_nce(stats["student_pool"], stats["teacher_pool"], where=there, temperature=features["contrastive"].temperature)
            values = jnp.where(jnp.any(stats["teacher_pool"] != 0), values, 0.0)
            terms["contrastive"] = Term(jnp.sum(values), jnp.sum(there, dtype=jnp.float32))
        return terms, extra

    def measure(params, variables, frozen, batch):
        tokens, labels, where, layout = next_token(batch)
        ours, head = student.features(params["student"], tokens, layout)
        target = teacher.outputs(frozen, batch)[1] if kd.mode == "logits" else None
        sums = language.chunked_sums((ours["final"], head), labels, where, frozen["token_bytes"], target, vocab=corpus.vocab)
        if not anchor.off:  # what the gate looks at: does the projected teacher say anything in the student's words?
            states, aligned = at_places(batch, teacher.outputs(frozen, batch)[0]["final"])
            states = into_student.apply({"params": params["projector"]}, states)
            known = where & aligned
            found = language.chunked_sums((states, head), labels, known, frozen["token_bytes"], vocab=corpus.vocab)
            sums |= {"projector_nll": found["nll"], "projector_tokens": found["tokens"]}
        return sums

    @jax.jit
    def sums(params, frozen, batch):
        tokens, _, where, layout = next_token(batch)
        states, aligned = at_places(batch, teacher.outputs(frozen, batch)[0]["final"])
        ours, _ = student.features(params["student"], tokens, layout)
        return projector.moments(states, ours["final"], where & aligned)

    def calibrate(variables, frozen, batches):
        """Fits the projector's matrix, so that the teacher speaks the student's language before the first update."""
        params = variables.params
        if project.init == "heads":
            found = projector.from_heads(*teacher.shared_heads(frozen, student.head(params["student"])), project.ridge)
        else:
            parts = [on_host(sums(params, frozen, batch)) for batch in itertools.islice(batches, project.calibration)]
            found = projector.fit(jax.tree.map(lambda *x: sum(x), *parts), project.ridge)
        return variables._replace(params=params | {"projector": found})

    def data(split, seed):
        found = teacher.batches(split, batch_size, seed)
        return on_policy.Marked(found) if sampler and split == "train" else found

    def export(params, folder):
        student.save(params["student"], folder, eos=corpus.eos)
        tokenizer.save(corpus.tokenizer, folder)

    gate = None
    if project.gate and not anchor.off:
        gate = language.unigram_nll(corpus.splits["train"].labels, corpus.splits["validation"].labels, corpus.vocab)
    reaction = reactions.chosen(react, weights, gate=gate)
    rest = (("projector", "projector/", project.lr_mult), ("router", "match/router", features["router"].lr_mult),
            ("match", "match/(?!router)", 1.0))
    return Recipe(
        init=init, loss=loss, whole=whole, weights=weights, knobs=knobs,
        optim_rules=sum((groups(name, root, "kernel$", decay, lr_mult) for name, root, lr_mult in rest),
                        groups("student", "student/", student.decay, decay)),
        sharding_rules=((r"(^|/)(projector|match)/", jax.P()), *student.sharding, *teacher.sharding),
        data=data,
        evaluators={split: Evaluator(split, measure, language.finish) for split in ("validation", "test")},
        frozen=frozen,
        calibrate=calibrate if not anchor.off and project.init in projector.FITTED else None,
        sampler=sampler, controls=reaction.controls, memory=reaction.memory, react=reaction.react,
        export=export,
        describe=lambda batch: text.describe(batch, corpus),
        preflight=lambda variables, batch: told(corpus, batch),
        outputs=storing.outputs(teacher, kd, temperature, on, sampler is not None),
        facts={**corpus.facts, "student": student.facts, "teacher": teacher.facts, "parameters": student.parameters},
    )


def _spans(kd, batch, student, teacher, at_places):
    """alm: (value of each aligned span, the spans there are). student, teacher: (last states, output embedding, number of ids)."""
    (hidden, head, vocab), (teacher_hidden, teacher_head, teacher_vocab) = student, teacher
    labels, teacher_labels = batch["tokens"][:, 1:], batch["teacher_tokens"][:, 1:]
    spans, teacher_spans = batch["spans"], batch["teacher_spans"]
    known = (spans >= 0) & batch["valid"][:, None]
    ours = cross_tokenizer.token_log_probs(hidden, head, labels, where=known, vocab=vocab)
    theirs = cross_tokenizer.token_log_probs(teacher_hidden, teacher_head, teacher_labels, where=teacher_spans >= 0, vocab=teacher_vocab)
    values, there = cross_tokenizer.alm(theirs, ours, teacher_spans, jnp.where(known, spans, -1), tau=kd.tau)
    return kd.tau * values, there  # as T^2 elsewhere: the gradient keeps its size whatever tau is


def _ranks(kd, batch, student, teacher, at_places):
    """uld: (distance at each aligned place, those places). Else as `_spans`."""
    (hidden, head, vocab), (teacher_hidden, teacher_head, teacher_vocab) = student, teacher
    _, _, where, _ = next_token(batch)
    states, aligned = at_places(batch, teacher_hidden)
    known, vocabs = where & aligned, {"vocab": vocab, "teacher_vocab": teacher_vocab}
    return cross_tokenizer.chunked_uld(states, teacher_head, hidden, head, where=known, **vocabs), known
