"""The faults, each with the place it changes, the check that it must fail, and what the doctor should say of a run with it."""

import pytest

from jaxdistill.models import kaf
from tests import jobs
from tests.data import produced, test_group_splits, test_sequences, test_teacher_cache
from tests.data.test_image_batches import test_a_partner_is_another_row_of_the_same_part as partners
from tests.evaluators import test_classification, test_distribution, test_retrieval
from tests.invariants import cases, checks
from tests.invariants import test_dcal as dcal_cases
from tests.losses import test_classification as test_cross_entropy
from tests.losses import (
    test_cross_tokenizer,
    test_divergences,
    test_features,
    test_fused_vocab,
    test_metric_learning,
    test_regularisation,
    test_soft_targets,
    test_targets,
    test_weighting,
)
from tests.models import test_dcal, test_generation, test_graph_transformer, test_kaf, test_matching, test_readout, test_reservoir, test_vit
from tests.mutations.planting import Edit, Mutation
from tests.recipes import test_language, test_soft_label
from tests.recipes import test_reservoir as test_reservoir_recipe
from tests.recipes.conftest import ready
from tests.training import test_checkpoint, test_loop, test_objective, test_optim, test_state


def fault(name: str, finding: str, check, *edits: tuple[str, str, str]) -> Mutation:
    return Mutation(name, tuple(Edit(f"jaxdistill.{place}", old, new) for place, old, new in edits), check, finding)


# What a check needs that is made with the fault in it


def skipped():
    one = jobs.ready(test_state.job(**{"toy.poison": 63}))
    test_state.TestSkip().test_a_non_finite_update_changes_nothing_but_the_counters(one, one.state)


def averaged():
    one = jobs.ready(test_state.job(**{"toy.poison": 63}))
    test_state.TestAverage().test_it_is_the_weighted_mean_of_the_history(one, one.state)


def patched(check, *args):
    with pytest.MonkeyPatch.context() as patch:
        check(*args, patch)


def micro_batches():
    one = jobs.ready(test_state.job(**test_state.RAGGED))
    test_state.TestMicroBatches().test_k_micro_batches_are_one_batch(one, test_state.gradients(one, 1, test_state.batch()), 4)


def whole_batch():
    one = jobs.ready(test_state.job(**test_state.RAGGED))
    test_state.TestMicroBatches().test_the_gradient_is_that_of_the_total(one, test_state.gradients(one, 1, test_state.batch()))


def dense(**options):
    test_fused_vocab.test_it_equals_the_dense_form(test_fused_vocab.Case(**options))


def tempered():
    dense(temperature=2.0)


def settled():
    test_weighting.test_weights_settle_at_the_log_of_a_fixed_loss(None)


def measured():
    test_classification.test_they_are_their_definitions(0)


def hidden(job):
    checks.the_teacher_gets_no_gradient(cases.language(job, kd=dict(weight=((0.0, 0.0),)), hidden=dict(weight=((0.0, 0.5),))))


def at_odds(job):
    one = ready(job)
    assert checks.values(one.built.recipe, one, next(one.built.recipe.data("train", 0)))["kd"] > 1e-3


def taught(folder: str) -> checks.Case:
    """A plain ViT that is taught, and begins as its teacher."""
    plain = dict(data=dict(task="classification", classes=6, test=0.0, test_per_class=4), monitor="validation/accuracy",
                 dcal=dict(mode="sa_only"), kd=dict(weight=((0.0, 0.7),)), teacher=dict(path=folder))
    same = plain | dict(model=dict(path=folder, head="stored", patch=0, width=0, depth=0, heads=0))
    found = dcal_cases.case(**plain)
    found.zero, found.taught = ("kd",), lambda: (one := dcal_cases.ready(**same), one.state.params)
    return found


def stored(tmp_path):
    produced.write(tmp_path)
    test_teacher_cache.test_what_was_put_in_comes_out(tmp_path)


def nothing_to_learn(plain_vit):
    checks.a_student_equal_to_its_teacher_has_nothing_to_learn(taught(plain_vit))


MUTATIONS = (
    # The step
    fault("decay_coupled_in_adam", "weights_decaying_away", lambda: test_optim.test_decay_is_decoupled(test_optim.ADAMW),
          ("training.optim:optimizer", 'if config.decay == "coupled" else', "if True else")),
    fault("stepped_every_other_call", "optimizer_not_stepping", test_state.test_an_update_is_of_its_step,
          ("training.state:make_train_step", "updates = optax.tree.scale(rate, updates)",
           "updates = optax.tree.scale(rate * (state.step % 2), updates)")),
    fault("never_stepped", "optimizer_not_stepping", test_state.test_an_update_is_of_its_step,
          ("training.state:make_train_step", "join(optax.apply_updates(train, updates), state.params)", "state.params")),
    fault("rate_in_micro_steps", "lr_zero", test_state.test_an_update_is_of_its_step,
          ("training.state:make_train_step", "lr(state.step)", "lr(state.step * micro)")),
    fault("rate_of_the_group_forgotten", "", test_optim.test_lr_mult_multiplies_the_update,
          ("training.optim:optimizer", "optax.scale(-group.lr_mult)", "optax.scale(-1.0)")),
    fault("weights_one_step_late", "", test_state.test_an_update_is_of_its_step,
          ("training.state:make_train_step", "state.controls, state.step)", "state.controls, state.step - 1)")),
    fault("the_same_draws_at_every_step", "", test_state.test_an_update_is_of_its_step,
          ("training.state:make_train_step", "jax.random.fold_in(state.rng, state.step)", "state.rng")),
    fault("mean_of_micro_means", "ledger_gap", micro_batches,
          ("training.state:make_gradients", "share, aux = loss(train, part, key, scale, probing)",
           ("own = {n: micro * jnp.maximum(t.count, 1) for n, t in loss(train, part, key, scale)[1].terms.items()}; "
           "share, aux = loss(train, part, key, weights | {n: weights[n] / own[n] for n in own})"))),
    fault("micro_batches_not_divided", "ledger_gap", micro_batches,
          ("training.state:make_gradients", "jnp.maximum(count.sum(), 1)", "jnp.maximum(count.mean(), 1)")),
    fault("whole_batch_terms_not_differentiated", "", whole_batch,
          ("training.state:make_gradients", "jnp.sum(p * s, dtype=jnp.float32), pull, active)",
           "0.0 * jnp.sum(p * s, dtype=jnp.float32), pull, active)")),
    fault("frozen_leaf_in_the_clip", "", test_optim.test_the_clip_sees_all_groups_and_no_frozen_leaf,
          ("training.optim:cut", "if group.frozen == frozen else", "if group.frozen or not frozen else"),
          ("training.optim:optimizer", "if not group.frozen]", "]"),
          ("training.optim:optimizer", "None if group.frozen else group.name", "group.name"),
          ("training.optim:optimizer", "{group.name: chain(group) for",
           "{group.name: optax.set_to_zero() if group.frozen else chain(group) for")),
    fault("clip_of_each_group", "", test_optim.test_the_clip_sees_all_groups_and_no_frozen_leaf,
          ("training.optim:optimizer", "return optax.chain(*parts,", "return optax.chain(optax.clip_by_global_norm(config.clip), *parts,"),
          ("training.optim:optimizer", "if config.clip else []", "if False else []")),
    fault("not_a_number_applied", "non_finite", skipped,
          ("training.state:make_train_step", "lambda a, b: jnp.where(good, a, b), new, old)", "lambda a, b: a, new, old)")),
    fault("overflow_written", "", lambda: test_state.TestSkip().test_parameters_that_would_not_be_finite_are_not_written(),
          ("training.state:make_train_step", "(extra, cut(moved_to, groups))", "extra")),
    fault("skipped_step_not_counted", "", skipped,
          ("training.state:make_train_step", "step=state.step + 1,", "step=state.step + jnp.where(good, 1, 0),")),
    fault("division_by_no_token", "",
          lambda: test_state.TestMicroBatches().test_an_all_masked_batch_is_zero_with_zero_gradients(1),
          ("training.state:make_gradients", "jnp.maximum(count.sum(), 1) for name, count", "count.sum() for name, count")),
    fault("factor_not_in_the_ledger", "ledger_gap", test_objective.TestTerms().test_the_ledger,
          ("training.objective:ledger", "weight * term.factor * raw", "weight * raw")),
    fault("weight_without_a_term_unnoticed", "", test_objective.TestTerms().test_a_weight_without_a_term,
          ("training.objective:check_terms", "wanted != set(found)", "set(found) - wanted")),
    # The average of the weights
    fault("average_uncorrected", "", averaged,
          ("training.state:deployed", "(ema / weight)", "ema")),
    fault("average_begins_at_the_initial_weights", "ema_initial",
          averaged,
          ("training.state:fresh", "jnp.zeros_like, train) if ema", "jnp.copy, train) if ema"),
          ("training.state:fresh", "ema_weight=jnp.zeros(", "ema_weight=jnp.ones(")),
    fault("average_never_deployed", "ema_never_used",
          averaged,
          ("training.state:deployed", "begun = state.ema_weight > 0", "begun = state.ema_weight < 0")),
    fault("average_not_evaluated", "", test_loop.test_what_is_measured_and_exported_is_the_average,
          ("training.loop:_evaluate", "evaluate(ready, deployed(state),", "evaluate(ready, state.params,")),
    fault("average_not_in_the_row", "", test_loop.test_what_is_measured_and_exported_is_the_average,
          ("training.loop:_row", "_bare(evaluate(ready, deployed(state),", "_bare(evaluate(ready, state.params,")),
    fault("average_not_exported", "", test_loop.test_what_is_measured_and_exported_is_the_average,
          ("training.loop:train", "export(ready, deployed(state),", "export(ready, state.params,")),
    fault("teacher_trained", "frozen_moved", test_loop.test_what_is_measured_and_exported_is_the_average,
          ("training.loop:_steps", "state, metrics = step(state, ready.frozen, batch)",
           ("state, metrics = step(state, ready.frozen, batch)\n"
           "            ready.frozen = jax.tree.map(lambda x: 1.01 * x, ready.frozen)"))),
    # Resuming
    fault("resumed_without_the_place_in_the_data", "", test_checkpoint.test_what_was_saved_comes_back,
          ("training.checkpoint:Checkpoints.restore", 'data.set_state(sealed["position"])', "pass")),
    fault("resumed_without_moments", "", test_checkpoint.test_what_was_saved_comes_back,
          ("training.checkpoint:Checkpoints.restore", 'return state, sealed["memory"]',
           'return state.replace(opt=jax.tree.map(jax.numpy.zeros_like, state.opt)), sealed["memory"]')),
    fault("fingerprint_ignored", "",
          test_checkpoint.TestDamage().test_of_arrays_that_still_load_is_seen,
          ("training.checkpoint:Checkpoints._read", 'intact = int(fingerprint(state)) == host["fingerprint"]', "intact = True")),
    # Text
    fault("labels_not_shifted", "labels_not_shifted", test_language.test_next_token_masks_padding_and_the_seams_between_documents,
          ("recipes.lm:next_token", "labels, there = tokens[:, 1:]", "labels, there = tokens[:, :-1]")),
    fault("pads_counted", "padding_counted", test_language.test_next_token_masks_padding_and_the_seams_between_documents,
          ("recipes.lm:next_token", "(segments[:, 1:] > 0) & ", "")),
    fault("documents_joined", "", test_language.test_next_token_masks_padding_and_the_seams_between_documents,
          ("recipes.lm:next_token", "(segments[:, :-1] == segments[:, 1:]) & ", "")),
    fault("ends_not_learned", "", test_language.test_next_token_masks_padding_and_the_seams_between_documents,
          ("recipes.lm:next_token", "if end is not None", "if False")),
    fault("mean_over_padding", "padding_counted", lambda: dense(),
          ("losses.fused_vocab:fused_vocab_loss", "jnp.sum(mask, dtype=jnp.float32)", "jnp.asarray(mask.size, jnp.float32)")),
    fault("perplexity_at_a_clamp", "", lambda: test_language.test_perplexity_is_not_clamped(30.0),
          ("evaluators.language:finish", "math.inf if nll >= 700 else math.exp(nll)", "math.exp(min(nll, 20))")),
    fault("bits_per_token", "", test_language.test_bits_per_byte_by_hand,
          ("evaluators.language:sums", "count(token_bytes[labels])", "count(1.0)")),
    fault("smoothing_in_evaluation", "", lambda: test_fused_vocab.test_probes_are_what_evaluation_measures(None),
          ("evaluators.language:sums", "cross_entropy(logits, labels, where", "cross_entropy(logits, labels, smoothing=0.1, where")),
    # Divergences
    fault("top_k_renormalised", "", test_divergences.test_coarse_kl_grows_with_k_to_the_full_one,
          ("losses.divergences:topk_kl", "    return ",
           ("    log_p, log_q = (jax.nn.log_softmax(jnp.where(top, x, OUTSIDE), axis=-1) for x in (log_p, log_q))\n"
           "    return _kl(log_p, log_q)\n    return "))),
    fault("beta_inverted", "", lambda: test_divergences.test_each_is_chosen_by_name_with_the_option_it_takes("jsd"),
          ("losses.divergences:jsd", "_log_mixture(beta, log_p, log_q)", "_log_mixture(1 - beta, log_p, log_q)"),
          ("losses.divergences:jsd", "beta * _kl(log_p, log_m) + (1 - beta)", "(1 - beta) * _kl(log_p, log_m) + beta")),
    fault("ends_of_beta_exchanged", "", test_divergences.test_the_ends_of_the_options_are_other_divergences,
          ("losses.divergences:jsd", "(reverse_kl if beta else forward_kl)", "(forward_kl if beta else reverse_kl)")),
    fault("kl_the_other_way_round", "", tempered,
          ("losses.fused_vocab:_share", "distance(target, logits,", "distance(logits, target,")),
    fault("t_squared_forgotten", "", tempered, ("losses.fused_vocab:_share", "temperature**2 * total", "total")),
    fault("padded_vocabulary_counted", "", lambda: dense(vocab=60), ("losses.fused_vocab:_finish", "raw[..., :vocab]", "raw")),
    fault("kept_ids_renormalised", "", lambda: test_targets.TestTopK().test_a_tail_of_no_mass_still_counts_for_the_student(-300.0),
          ("losses.targets:buckets", "jnp.maximum(target.log_tail.astype(jnp.float32), OUTSIDE)",
           "jnp.full_like(target.log_tail, -jnp.inf)")),
    fault("smoothing_of_the_wrong_sign", "", lambda: test_cross_entropy.test_cross_entropy_equals_torch_with_its_gradient(0.1),
          ("losses.classification:cross_entropy", "loss + smoothing *", "loss - smoothing *")),
    # Generation
    fault("cache_sees_other_documents", "", test_generation.test_a_packed_prompt_continues_its_last_document_and_sees_no_other,
          ("models.kv_cache:visible", "(segments[:, None, :, None] == _append", "(segments[:, None, :, None] <= 9 + _append")),
    fault("tail_of_the_nucleus_drawn", "", lambda: test_generation.test_it_draws_from_the_distribution_that_was_asked_for(1.5, 0.6),
          ("models.generation:_draw", "logits >= least, logits, -jnp.inf", "logits >= least, logits, logits")),
    # Features and what lies between two models
    fault("softmax_of_attention_rows", "", test_features.TestAttention().test_the_definition_takes_probabilities,
          ("losses.attention:attention_kl", "teacher, student = teacher.astype(jnp.float32), student.astype(jnp.float32)",
           "import jax; teacher, student = jax.nn.softmax(teacher), jax.nn.softmax(student)")),
    fault("layers_one_off", "", lambda: test_features.TestHidden().test_the_map_of_layers(3, 12, (3, 7, 11)),
          ("losses.hidden:layer_map", "(s + 1) * teacher_depth // student_depth) - 1", "s * teacher_depth // student_depth)")),
    fault("states_of_any_size", "", test_features.TestHidden().test_zero_iff_proportional,
          ("losses.hidden:rms_distance", "(rms_normalised(_masked(x, where)) for", "(_masked(x, where) for")),
    fault("teacher_one_place_off", "", test_cross_tokenizer.test_gather_takes_the_aligned_states_and_nothing_else,
          ("losses.cross_tokenizer:gather_aligned", "jnp.where(where, aligned, 0)", "jnp.where(where, jnp.maximum(aligned - 1, 0), 0)")),
    fault("teacher_differentiated", "",
          test_cross_tokenizer.test_alm_gives_the_teacher_no_gradient_and_looks_at_no_label_without_a_span,
          ("losses.cross_tokenizer:alm", "jax.lax.stop_gradient(teacher_log_probs)", "teacher_log_probs")),
    fault("balance_of_the_router_summed", "", test_matching.TestRouter().test_the_load_balance,
          ("models.matching:load_balance", "jnp.mean((mean", "jnp.sum((mean")),
    fault("router_rewarded_for_collapse", "router_collapsed", test_matching.TestRouter().test_the_load_balance,
          ("models.matching:load_balance", "(mean - 1 / summed.shape[1]) ** 2", "-((mean - 1 / summed.shape[1]) ** 2)")),
    fault("router_of_one_feature", "router_collapsed", test_matching.TestRouter().test_ranks_of_equals,
          ("models.router:rank", "jnp.sum(ahead | ties, axis=-1)", "jnp.sum(jnp.broadcast_to(earlier, ahead.shape), axis=-1)")),
    fault("the_target_is_the_student", "teacher_follows_student", at_odds,
          ("recipes.student_aware:make", '{"teacher": target, ', '{"teacher": (ours["final"], head), ')),
    fault("teacher_differentiated_in_a_language_model", "", hidden,
          ("recipes.teachers:InMemory.outputs", "jax.lax.stop_gradient(found)", "found")),
    # Images
    fault("layer_norm_over_the_batch", "batch_statistics", test_dcal.test_queries_carry_no_gradient_and_do_not_depend_on_the_batch,
          ("models.layers:LayerNorm.__call__", "x - x.mean(-1, keepdims=True)", "x - x.mean(0, keepdims=True)"),
          ("models.layers:LayerNorm.__call__", "jnp.square(x).mean(-1, keepdims=True)", "jnp.square(x).mean(0, keepdims=True)")),
    fault("pair_discarded", "", test_dcal.test_the_pair_reaches_pwca_alone_and_from_any_depth,
          ("models.dcal:DCAL.__call__", "trunk.ln_f(paired)[:, 0]", "trunk.ln_f(x[:batch])[:, 0]")),
    fault("pair_masked", "", test_dcal.test_the_pair_reaches_pwca_alone_and_from_any_depth,
          ("models.vit:Attention.__call__", "attend(q, *both)", "attend(q, k, v)")),
    fault("pair_is_the_image_itself", "", test_dcal.test_the_pair_reaches_pwca_alone_and_from_any_depth,
          ("models.dcal:DCAL.__call__", "(k[partner], v[partner])", "(k[:batch], v[:batch])")),
    fault("partner_is_the_row_itself", "", lambda tmp_path: partners(tmp_path, 8, 1),
          ("data.image_batches:_Batches._partners", "(row + np.int32(shift))", "row")),
    fault("partner_in_another_micro_batch", "", lambda tmp_path: partners(tmp_path, 8, 4),
          ("data.image_batches:_Batches._partners", "shift = self.micro * int(", "shift = int(")),
    fault("pair_under_a_softmax_of_its_own", "", lambda: patched(test_dcal.test_a_pair_whose_keys_are_masked_changes_nothing),
          ("models.vit:Attention.__call__", "out, attention = attend(q, *both)",
           ("out, attention = attend(q, *both)\n"
           "    out = out if pair is None else 0.5 * (attend(q, k, v)[0] + attend(q, *pair)[0])"))),
    fault("rollout_without_identity", "", test_vit.test_rollout_is_the_product_of_the_definition,
          ("models.vit:roll", 'return 0.5 * (jnp.matmul(attention, rollout, precision="highest") + rollout)',
           'return jnp.matmul(attention, rollout, precision="highest")')),
    fault("rollout_whose_rows_are_not_1", "", test_vit.test_rollout_is_the_product_of_the_definition,
          ("models.vit:roll", "return 0.5 * (attention + ", "return (attention + ")),
    fault("rollout_differentiated", "", test_dcal.test_queries_carry_no_gradient_and_do_not_depend_on_the_batch,
          ("models.vit:roll", "jax.lax.stop_gradient(attention)", "attention")),
    fault("queries_from_the_wrong_end", "", test_dcal.test_queries_are_where_cls_looks,
          ("models.dcal:DCAL.__call__", "jax.lax.top_k(seen,", "jax.lax.top_k(-seen,")),
    fault("queries_without_effect", "", lambda: test_dcal.test_which_patches_are_chosen_matters_to_the_mean_and_never_to_cls("mean"),
          ("models.dcal:DCAL.__call__", 'local[:, 0] if b.readout == "cls" else local.mean(1)', "local[:, 0]")),
    fault("mean_of_logits_for_probabilities", "", measured,
          ("evaluators.classification:fused", "jax.nn.logsumexp(logs, axis=0) - jnp.log(jnp.float32(len(logs)))", "logs.mean(0)")),
    fault("padding_measured", "", measured,
          ("evaluators.classification:_sums", "jnp.sum(jnp.where(where, values.astype(", "jnp.sum(jnp.where(True, values.astype(")),
    fault("loss_weights_of_the_wrong_sign", "", settled,
          ("losses.weighting:factor", "jnp.exp(-_clipped", "jnp.exp(_clipped")),
    fault("loss_weights_without_their_prior", "", settled,
          ("losses.weighting:prior", "return 0.5 * sum(", "return 0.0 * sum(")),
    fault("the_image_itself_as_positive", "", test_metric_learning.test_anchors_without_a_positive_or_without_a_negative_do_not_count,
          ("losses.metric_learning:hardest", "pairs & same & ~jnp.eye(len(labels), dtype=bool)", "pairs & same")),
    fault("the_nearest_positive", "", lambda: test_metric_learning.test_it_is_its_definition(0, 0.3),
          ("losses.metric_learning:hardest",
           "jnp.argmax(jnp.where(positive, squared, -jnp.inf)", "jnp.argmin(jnp.where(positive, squared, jnp.inf)")),
    fault("precision_by_the_trapezoid", "", test_retrieval.test_an_example_by_hand,
          ("evaluators.retrieval:_summary", "np.mean(np.arange(1, matches + 1) / places)",
           "np.mean((np.arange(1, matches + 1) / places + np.arange(matches) / np.maximum(places - 1, 1)) / 2)")),
    fault("own_camera_counted", "", test_retrieval.test_an_example_by_hand,
          ("evaluators.retrieval:evaluate", "if place >= 0:", "if place < -1:")),
    fault("junk_ranked", "", test_retrieval.test_an_example_by_hand,
          ("evaluators.retrieval:evaluate", "(label >= 0) & gallery", "gallery")),
    fault("image_teacher_differentiated", "",
          lambda plain_vit: checks.the_teacher_gets_no_gradient(taught(plain_vit)),
          ("recipes.classifier_teachers:InMemory.logits", "return jax.lax.stop_gradient(found)", "return found")),
    fault("teacher_in_training_mode", "", nothing_to_learn,
          ("recipes.classifier_teachers:InMemory.logits", 'batch["image"]))', 'batch["image"]), key=jax.random.key(1))'),
          ("recipes.classifier_teachers:_described", 'head="stored"', 'head="stored", drop_path=0.5')),
    # Stored teachers
    fault("cached_row_of_a_neighbour", "", stored, ("data.shards:Reader.take", "[row % self.per, start", "[row % self.per - 1, start")),
    fault("cached_draw_always_the_first", "", stored,
          ("data.shards:Reader.take", "(np.asarray(view) % shape[0])", "(np.asarray(view) % 1)")),
    # Sequences
    fault("kernel_of_the_norm", "zero_gradient",
          lambda: test_kaf.test_it_is_the_formula_of_each_neuron_at_any_width(kaf.kaf, 256),
          ("models.kaf:kaf", "return _kaf(flat, alpha, gamma, points).reshape(s.shape)",
           ("apart = jnp.stack([jnp.sum(jnp.square(flat - point), axis=-1) for point in points], axis=-1)\n"
           "    return (jnp.exp(-jnp.mean(gamma) * apart) @ alpha).reshape(s.shape)"))),
    fault("gamma_may_turn_negative", "", test_kaf.test_a_trained_gamma_begins_at_the_presets_and_stays_positive,
          ("models.kaf:KAF.__call__", "jax.nn.softplus(self.param(", "(self.param("),
          ("models.kaf:KAF.__call__", "nn.initializers.constant(start)", "nn.initializers.constant(preset.gamma)")),
    fault("normalised_over_the_batch", "batch_statistics", test_readout.test_no_example_sees_another,
          ("models.readout:Readout.__call__", "nn.LayerNorm(dtype=self.dtype, name=name)(x)",
           "nn.LayerNorm(dtype=self.dtype, name=name)((x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True) + 1e-5))")),
    fault("representation_normalised_over_the_batch", "batch_statistics", test_readout.test_no_example_sees_another,
          ("models.readout:Representation.__call__", 'nn.LayerNorm(name="norm")', 'nn.LayerNorm(name="norm", reduction_axes=0)')),
    fault("mean_over_frames_of_padding", "", test_readout.test_padding_changes_nothing,
          ("models.readout:statistics",
           "number = jnp.sum(counts, axis=1, dtype=x.dtype)", "number = jnp.full((len(x), 1), x.shape[1], x.dtype)")),
    fault("attention_to_frames_of_padding", "", test_readout.test_padding_changes_nothing,
          ("models.readout:Representation.__call__", "jnp.where(where, scores, -jnp.inf)", "scores")),
    fault("reservoir_runs_through_padding", "", test_reservoir.test_it_is_the_recurrence_in_both_directions,
          ("models.reservoir:run", "jnp.where(counts[..., None], ", "jnp.where(True, ")),
    fault("leak_inverted", "", test_reservoir.test_it_is_the_recurrence_in_both_directions,
          ("models.reservoir:run", "(1 - rate) * state + rate * fresh", "rate * state + (1 - rate) * fresh")),
    fault("radius_not_set", "", lambda: test_reservoir.test_the_radius_is_exact(20, 0.5),
          ("models.reservoir:draw", "w * (config.radius / size)", "w")),
    fault("dropout_in_evaluation", "", test_reservoir_recipe.test_an_evaluation_draws_nothing,
          ("recipes.reservoir:make", 'see(params, variables.extra, frozen, batch["x"], batch["length"])',
           'see(params, variables.extra, frozen, batch["x"], batch["length"], jax.random.key(0))')),
    fault("scaler_of_sequences_on_all_data", "", test_reservoir_recipe.test_the_scaler_is_fitted_on_the_frames_that_train,
          ("recipes.reservoir:make", "lambda: map(of, map(train.take, parts))",
           'lambda: map(of, [*map(train.take, parts), sets.splits["test"].take(np.arange(len(sets.splits["test"])))])')),
    fault("components_on_all_data", "",
          lambda ragged: test_sequences.test_what_is_not_training_changes_no_fit(ragged, dict(reduce="pca", components=3)),
          ("data.sequences:_load", 'map(raw, found["train"])', "map(raw, [i for each in found.values() for i in each])")),
    fault("labels_of_other_sequences", "", test_sequences.test_label_and_sequence_stay_together,
          ("data.sequences:Split.take", '"label": self.labels[indices]', '"label": self.labels[indices[::-1]]')),
    fault("classes_that_never_train", "", test_group_splits.test_a_test_class_that_never_trains,
          ("data.group_splits:_check_classes", "- trained.keys()):", "- trained.keys() - set(labels)):")),
    fault("too_few_of_a_class", "", test_group_splits.test_fewer_than_k_of_a_class,
          ("data.group_splits:_check_classes", "if trained[label] < rule.min_per_class]:", "if trained[label] < 1]:")),
    fault("groups_on_two_sides", "", test_group_splits.test_a_stratified_draw_with_groups,
          ("data.group_splits:_check_groups", "if both := ", "if both := set() and ")),
    fault("groups_drawn_row_by_row", "groups_leak", test_group_splits.test_groups_stay_whole,
          ("data.group_splits:assign", 'whole = kind == "groups" or', 'whole = kind == "grouped" or'),
          ("data.group_splits:_check_groups", "if both := ", "if both := set() and ")),
    # Label distributions
    fault("scaler_on_all_data", "", test_soft_label.test_inputs_are_standardised_on_the_training_split,
          ("recipes.soft_label:make", "distributions.moments(train)",
           'distributions.moments(distributions.joined(train, sets.splits["test"]))')),
    fault("inputs_left_as_they_are", "inputs_unscaled", test_soft_label.test_inputs_are_standardised_on_the_training_split,
          ("recipes.soft_label:make", "found = distributions.moments(train)",
           'found = {name: {"mean": 0 * m["mean"], "std": 0 * m["std"] + 1} for name, m in distributions.moments(train).items()}')),
    fault("entropy_penalty_of_the_wrong_sign", "saturated", lambda: test_regularisation.test_definition_gradient_and_mask("linear"),
          ("losses.regularisation:entropy_floor", "floor - entropy(logits, where=where)", "entropy(logits, where=where) - floor")),
    fault("confidence_rewarded", "saturated", lambda: test_regularisation.test_definition_gradient_and_mask("confidence"),
          ("losses.regularisation:confidence_penalty", "math.log(logits.shape[-1]) - entropy", "entropy")),
    fault("class_weights_twice", "", test_soft_label.test_the_loss_is_the_mean_divergence,
          ("recipes.soft_label:make", 'classification.sample_weights(batch["target"], per_class)',
           'classification.sample_weights(batch["target"], per_class) ** 2')),
    fault("class_weights_for_example_weights", "",
          test_soft_targets.test_weights_of_examples_leave_the_optimum_and_those_of_classes_move_it,
          ("losses.classification:sample_weights", "target.astype(jnp.float32) * weights", "weights")),
    fault("temperature_of_training_deployed", "", test_soft_label.test_what_is_deployed_has_the_bounds_and_its_own_temperature,
          ("recipes.soft_label:make", "/ soft.temperature_inference", "/ soft.temperature")),
    fault("mixed_rows_with_targets_of_one", "", test_soft_label.test_a_mixed_row_has_a_mixed_target,
          ("recipes.soft_label:make", 'for name in ("x", "target")}', 'for name in ("x",)}')),
    fault("unreachable_target_accepted", "target_unreachable", test_soft_label.test_the_wall_is_where_the_guard_says,
          ("recipes.soft_options:SoftConfig.guard", "if self.guards:", "if not self.guards:")),
    fault("absent_neighbours_attended", "", test_graph_transformer.test_padding_changes_nothing,
          ("models.graph_transformer:StarAttention.__call__", 'jnp.where(mask[..., None], score("bhd,bnhd->bnh", q0, k) + towards, MASKED)',
           'score("bhd,bnhd->bnh", q0, k) + towards')),
    fault("spread_of_nothing", "", test_distribution.test_the_two_collapses_are_told_apart,
          ("evaluators.distribution:spread", " - np.mean(_entropy(p))", "")),
    fault("smoothing_by_classes_less_one", "", lambda: test_soft_targets.test_focal_is_its_definition(True, 2.0, 0.2),
          ("losses.classification:smoothed", "smoothing / target.shape[-1]", "smoothing / (target.shape[-1] - 1)")),
)
