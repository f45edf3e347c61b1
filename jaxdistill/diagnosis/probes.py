"""What is measured inside the step: norms of groups, what moved, and what distributions look like. Plain arrays in and out.

A probe is a pair (sum, count) that the log divides: sums over micro-batches and devices then give the mean over the batch. What is a
function of the batch as a whole (`BATCHWISE`) is measured on each micro-batch, and its mean over them is logged.
"""

import jax
import jax.numpy as jnp
import optax

BATCHWISE = ("spread", "classes_predicted", "logit_std")
OF_TEACHER = ("teacher_entropy", "teacher_kl", "top1_agreement", "teacher_nll")


def group_norms(grads, before, after, groups) -> dict:
    """Group name -> gradient norm (before the clip), parameter norm before the update, norm of what the update really changed over it,
    and `changed`, the share of the group's leaves in which any bit is another one.

    All trees hold the trainable leaves only; `groups` is the tree of their Group."""
    members: dict[str, list[int]] = {}
    for index, group in enumerate(jax.tree.leaves(groups)):
        members.setdefault(group.name, []).append(index)
    steps = jax.tree.map(jnp.subtract, after, before)
    leaves = [jax.tree.leaves(tree) for tree in (grads, steps, before)]
    changed = [jnp.any(bits(a) != bits(b)) for a, b in zip(leaves[2], jax.tree.leaves(after), strict=True)]
    found = {}
    for name, indices in members.items():
        grad, step, param = (optax.tree.norm([tree[index] for index in indices]) for tree in leaves)
        ratio = jnp.where(param > 0, step / jnp.maximum(param, 1e-30), 0.0)
        share = jnp.stack([changed[index] for index in indices]).mean(dtype=jnp.float32)
        found[name] = {"grad_norm": grad, "param_norm": param, "update_ratio": ratio, "changed": share}
    return found


def moved(grads) -> jax.Array:
    """bool [leaves]: which leaves have a gradient that is not all zero, in the order of jax.tree.leaves."""
    return jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads)])


def of_logits(logits, where, *, labels=None, teacher=None) -> dict:
    """Probes of one prediction an example.

    logits: float [batch, classes]. where: bool [batch], the examples that count. labels: int [batch], or distributions
    [batch, classes], whose largest probability is then the label of `correct`. teacher: logits as `logits`.

    Returns, as (sum, count), in nats:
      valid: share of the examples that count. entropy: mean H(p). spread: H(mean p) - mean H(p), the information that predictions
      hold about which example they are of: 0 for a constant predictor. classes_predicted: share of the classes that are some example's
      first choice. logit_std: standard deviation over the examples of each logit, averaged over the classes. logit_abs_max: largest
      |logit| of an example, averaged. (Logits less their mean over the classes, which no softmax sees.)
      With labels correct and nll, with a teacher teacher_entropy, teacher_kl (KL(teacher || student) at T = 1), top1_agreement, and
      with both teacher_nll.
    """
    rows = where[:, None]
    count = jnp.sum(where, dtype=jnp.float32)
    over = lambda values: (jnp.sum(jnp.where(where, values.astype(jnp.float32), 0.0)), count)  # noqa: E731
    z = jnp.where(rows, logits.astype(jnp.float32), 0.0)
    z = z - jnp.mean(z, axis=-1, keepdims=True)
    log_p = jax.nn.log_softmax(z)
    p = jnp.exp(log_p)
    least = jnp.maximum(count, 1.0)
    average = lambda values: jnp.sum(jnp.where(rows, values, 0.0), axis=0, keepdims=True) / least  # noqa: E731
    hidden, first = entropy(p), jnp.argmax(z, axis=-1)
    classes = jnp.arange(z.shape[-1], dtype=first.dtype)[None]
    chosen = jnp.any((first[:, None] == classes) & rows, axis=0)
    deviation = jnp.sqrt(average(jnp.square(z - average(z))))
    found = {
        "valid": (count, jnp.asarray(where.size, jnp.float32)), "entropy": over(hidden),
        "spread": (count * entropy(average(p))[0] - over(hidden)[0], count),
        "classes_predicted": (count * jnp.mean(chosen, dtype=jnp.float32), count),
        "logit_std": (count * jnp.mean(deviation), count), "logit_abs_max": over(jnp.max(jnp.abs(z), axis=-1)),
    }
    target = None if labels is None else (labels[:, None] == classes).astype(jnp.float32) if labels.ndim == 1 else labels
    if target is not None:
        found |= {"correct": over(jnp.argmax(target, axis=-1) == first), "nll": over(-jnp.sum(target * log_p, axis=-1))}
    if teacher is not None:
        log_t = jax.nn.log_softmax(jnp.where(rows, teacher.astype(jnp.float32), 0.0))
        t = jnp.exp(log_t)
        found |= {"teacher_entropy": over(entropy(t)), "teacher_kl": over(jnp.sum(t * (log_t - log_p), axis=-1)),
                  "top1_agreement": over(jnp.argmax(log_t, axis=-1) == first)}
        if target is not None:
            found["teacher_nll"] = over(-jnp.sum(target * log_t, axis=-1))
    return found


def entropy(p):
    """H(p) of distributions along the last axis, in nats; 0 log 0 = 0."""
    return -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)


def abs_max(arrays, where):
    """(sum, count) of the largest |number| of an example in any of the `arrays` [batch, ...]; where: bool [batch]."""
    each = [jnp.max(jnp.abs(x.astype(jnp.float32)).reshape(len(x), -1), axis=-1) for x in arrays]
    largest = jnp.max(jnp.stack(each), axis=0)
    return jnp.sum(jnp.where(where, largest, 0.0)), jnp.sum(where, dtype=jnp.float32)


def bits(leaf) -> jax.Array:
    """A leaf's bits as unsigned integers: uint16 ones of what is that wide, else uint32."""
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_ or leaf.dtype.itemsize == 1:
        return leaf.astype(jnp.uint8).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, jnp.uint16 if leaf.dtype.itemsize == 2 else jnp.uint32)


@jax.jit
def fingerprint(tree) -> jax.Array:
    """uint32 checksum of every bit of every leaf, the same on any mesh.

    A position-weighted sum in modular arithmetic: its order does not matter, so shards may add up in any order."""

    def one(leaf):
        found = bits(leaf).astype(jnp.uint32).ravel()
        place = jnp.arange(found.size, dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(1)
        return jnp.sum((found ^ (found >> 15)) * (place | 1), dtype=jnp.uint32)

    mixed = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(tree):
        mixed = mixed * jnp.uint32(16777619) + one(leaf)
    return mixed
