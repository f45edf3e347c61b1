"""The documents' claims that a few lines of arithmetic decide.

    python experiments/claims/arithmetic.py
"""

import jax
import jax.numpy as jnp
import optax

from jaxdistill.losses.divergences import forward_kl


def normal(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape)


def lengths() -> None:
    print("'MSE grows with the sequence length' (hidden states [8, L, 64], independent):")
    for length in (16, 64, 256, 1024):
        a, b = normal(0, 8, length, 64), normal(1, 8, length, 64)
        gap = jnp.square(a - b)
        print(f"  L {length:5}: mean {gap.mean():.3f}   sum / (B L D) {gap.sum() / a.size:.3f}   sum / B {gap.sum() / 8:9.0f}")


def sizes() -> None:
    print("'a random projector gives a KL of 5.3 to 9' (vocabulary 50,257, 64 tokens):")
    uniform = jnp.log(jax.random.uniform(jax.random.key(0), (2, 64, 50_257)))
    print(f"  two normalised uniforms: {forward_kl(*uniform).mean():.2f} nats")
    for std in (0.1, 0.5, 1.0, 2.0):
        print(f"  logits N(0, {std}^2) on both sides: {forward_kl(*(std * normal(3, 2, 64, 50_257))).mean():.3f} nats (s^2 = {std**2:.2f})")


def temperatures() -> None:
    print("'T^2 makes the loss explode' (gradient of the student's logits, |z| about 1):")
    t, s = normal(0, 64, 1000), normal(1, 64, 1000)
    for T in (1.0, 2.0, 4.0, 8.0):
        norm = jnp.linalg.norm(jax.grad(lambda s, T=T: forward_kl(t, s, temperature=T).mean())(s))
        print(f"  T {T:3}: |gradient| {norm:.5f}   times T^2 {T**2 * norm:.5f}")


def rates() -> None:
    print("'5 times the rate, under a weight of 0.1, is half a rate' (20 updates of noise with a drift):")
    for name, make in (("adam", optax.adam), ("sgd", optax.sgd)):
        moved = []
        for weight, rate in ((1.0, 1e-3), (0.1, 5e-3)):
            tx = make(rate)
            x = jnp.zeros(1000)
            state = tx.init(x)
            for step in range(20):
                updates, state = tx.update(weight * (0.5 + normal(step, 1000)), state)
                x = optax.apply_updates(x, updates)
            moved.append(jnp.linalg.norm(x))
        print(f"  {name}: moved {moved[1] / moved[0]:.2f} times as far")


if __name__ == "__main__":
    for show in (lengths, sizes, temperatures, rates):
        show()
