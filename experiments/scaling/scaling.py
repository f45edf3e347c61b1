"""python -m experiments.scaling.scaling [--machine=v5e-64] [--pair=gpt2]: what a KD step needs of each device, by mesh shape.

Arithmetic, not measurements: the step that training runs is lowered for as many devices as the machine has, which XLA's CPU backend plays,
from shapes alone (nothing is allocated). Of the compiled program: bytes that a device holds, FLOPs of its matrix products and bytes of its
collectives, loops counted as often as they run.
"""

import argparse
import math
import os
import re
import types

MACHINES = {
    # devices; peak bf16 FLOP/s, bytes of memory, bytes/s of memory, bytes/s that one device sends over its links (all of them, one way)
    "v5e-64": (64, 197e12, 16e9, 819e9, 100e9),  # ICI: 1,600 Gbit/s a chip, both ways
    "h100-8": (8, 989e12, 80e9, 3.35e12, 450e9),  # SXM; NVLink: 900 GB/s, both ways
}
LARGEST = max(machine[0] for machine in MACHINES.values())
# Ordered as accelerators' compilers order a program, by the memory that it takes; as it is, a CPU runs what is ready, also what `remat`
# means to run later, and adds up all gradients at once.
ORDER = ("--xla_cpu_enable_concurrency_optimized_scheduler=false", "--xla_disable_hlo_passes=cse_barrier_expander,cpu-all-reduce-combiner")
FLAGS = os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={LARGEST}", *ORDER
os.environ["XLA_FLAGS"] = " ".join(FLAGS)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax.traverse_util import flatten_dict, unflatten_dict  # noqa: E402

from jaxdistill.losses.fused_vocab import fused_vocab_loss  # noqa: E402
from jaxdistill.models import gpt2, hf, llama  # noqa: E402
from jaxdistill.recipe import Aux, Recipe, Rest, Schedule, Variables  # noqa: E402
from jaxdistill.recipes.lm import groups, next_token  # noqa: E402
from jaxdistill.training import plan, prepare, sharding  # noqa: E402
from jaxdistill.training.deep import IN_A_HURRY  # noqa: E402

LLAMA = dict(vocab=128256, length=2048, heads=32, kv_heads=8, eps=1e-5)
GPT2 = dict(vocab=50257, length=1024)
# name -> (family, teacher, student)
PAIRS = {
    "gpt2": (gpt2, gpt2.GPT2Config(**GPT2, width=1600, depth=48, heads=25), gpt2.GPT2Config(**GPT2, width=768, depth=12, heads=12)),
    "llama": (llama, llama.LlamaConfig(**LLAMA, width=4096, depth=32, inner=14336),
              llama.LlamaConfig(**LLAMA, width=2048, depth=16, inner=8192, head_dim=64, tied=True)),
}
TITLES = {"gpt2": "GPT-2 XL (1.5 B) -> GPT-2 small", "llama": "Llama 3.1 8B -> Llama 3.2 1B"}
ROWS = {("gpt2", "v5e-64"): 256, ("gpt2", "h100-8"): 64, ("llama", "v5e-64"): 64, ("llama", "h100-8"): 16}  # of one batch
MESHES = {"v5e-64": ((64, 1, 1), (1, 64, 1), (8, 8, 1), (1, 16, 4)), "h100-8": ((8, 1, 1), (1, 8, 1), (1, 4, 2))}
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}


def recipe(family, teacher, student) -> Recipe:
    """Logits of the teacher and the labels, as student_aware has it by default, from sizes alone."""
    compute = dict(dtype=jnp.bfloat16, remat=True)
    kind = gpt2.GPT2 if family is gpt2 else llama.Llama
    theirs, ours = kind(teacher, **compute), kind(student, **compute)
    made = lambda module, key: module.init(key, jnp.zeros((1, 2), jnp.int32))["params"]  # noqa: E731
    head = lambda params: params["head" if "head" in params else "wte"]["embedding"]  # noqa: E731

    def frozen(place):
        """The teacher as `from_hf(frozen=True)` holds it."""
        dtype = hf.held(family.CAST, jnp.bfloat16)
        params = flatten_dict(made(theirs, jax.random.key(0)), sep="/")
        return {"teacher": unflatten_dict({path: leaf.astype(dtype(path)) for path, leaf in params.items()}, sep="/")}

    def loss(params, extra, frozen, batch, dials, key):
        tokens, labels, where, layout = next_token(batch)
        _, seen = jax.lax.stop_gradient(theirs.apply({"params": frozen["teacher"]}, tokens, **layout))
        _, features = ours.apply({"params": params["student"]}, tokens, **layout)
        total, terms, probes = fused_vocab_loss(
            features["final"], head(params["student"]), labels, where=where, scale=dials.scale, vocab=student.vocab,
            teacher=(seen["final"], head(frozen["teacher"])))
        return total, Aux(terms, {}, probes)

    return Recipe(
        init=lambda key: Variables({"student": made(ours, key)}), loss=loss, data=None,
        weights={"lm": Rest("kd"), "kd": Schedule(((0.0, 0.9),))},
        optim_rules=groups("student", "student/", family.decay(student), 0.01), sharding_rules=family.SHARDING,
        frozen=frozen,
    )


def compiled(pair: str, rows: int, shape: tuple):
    """The step of `rows` rows on the mesh `shape`."""
    family, teacher, student = PAIRS[pair]
    sections = plan.DEFAULTS
    built = prepare.Built(
        run=types.SimpleNamespace(seed=0), recipe=recipe(family, teacher, student),
        train=prepare.TrainConfig(**sections["train"] | dict(batch=rows)), optimizer=prepare.OptimizerConfig(**sections["optimizer"]),
        probes=prepare.ProbesConfig(every=0, deep=0), gates=prepare.GatesConfig(**sections["gates"]), monitor="", minimize=True,
        tensorboard=False)
    mesh = sharding.make_mesh(shape)
    ready = prepare.prepare(built, mesh, dry=True)
    place = lambda dtype, *more: jax.ShapeDtypeStruct((rows, *more), dtype, sharding=ready.batch_place)  # noqa: E731
    batch = {name: place(jnp.int32, student.length + 1) for name in ("tokens", "segments", "positions")} | {"valid": place(jnp.bool_)}
    return ready.step.lower(ready.abstract, ready.frozen, batch).compile(compiler_options=IN_A_HURRY)


def measured(program) -> dict:
    """Of one device, in bytes and FLOPs."""
    memory, cost = program.memory_analysis(), program.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    text = program.as_text()
    return {
        "arguments": memory.argument_size_in_bytes, "temporary": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "accessed": cost["bytes accessed"], "xla_flops": cost["flops"], **counted(text),
    }


SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(?.*?\)?) ([\w-]+)\(([^)]*)\)(.*)")


def elements(dims: str) -> int:
    return math.prod(int(size) for size in dims.split(",") if size)


def group(rest: str) -> int:
    """How many devices a collective runs between."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(counted[1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", rest)
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2]))


def counted(text: str) -> dict:
    """{"flops": of matrix products, kind: bytes that a device sends in it}, of a compiled program, the bodies of loops as often as
    they run. A ring sends (n - 1) / n of what is gathered, scattered or exchanged, and twice that of what is reduced to all."""
    programs, heads, name, entry = {}, {}, None, None
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = head[2]
            programs[name], heads[name] = {}, line
            entry = name if head[1] else entry
        elif name and (found := LINE.match(line)):
            programs[name][found[1]] = found.groups()[1:]

    def widened(program: dict, operand: str, rest: str) -> bool:
        """Whether a CPU, which lacks bfloat16, sends as float32 what others send as it is."""
        result, kind, _, more = program.get(operand, ("", "", "", ""))
        maker = re.search(r"calls=%?([\w.-]+)", more)
        dims = SHAPE.findall(result)[:1]
        return "_promoted" in rest or bool(kind == "fusion" and maker and dims and f"bf16[{dims[0][1]}]" in heads[maker[1]])

    def walk(name: str) -> dict:
        found, program = dict.fromkeys(("flops", *KINDS), 0.0), programs[name]
        for result, kind, given, rest in program.values():
            kind, operand, own = kind.removesuffix("-start"), given.split(",")[0].split("%")[-1].strip(), SHAPE.findall(result)
            if kind == "dot":
                dims = [int(size) for size in SHAPE.findall(program[operand][0])[0][1].split(",")]
                cut = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[1]
                found["flops"] += 2 * elements(own[0][1]) * math.prod(dims[int(at)] for at in cut.split(",") if at)
            if kind in KINDS:
                n = 2 if kind == "collective-permute" else group(rest)
                share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}.get(kind, (n - 1) / n)
                size = sum(SIZES[dtype] * elements(dims) for dtype, dims in own)
                found[kind] += share * size / (2 if widened(program, operand, rest) else 1)
            times = int(known[1]) if (known := re.search(r'known_trip_count":\{"n":"(\d+)"', rest)) else 1
            called = [] if kind in KINDS else re.findall(r"(?:calls|body|to_apply)=%?([\w.-]+)", rest)
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", rest):
                called += [part.strip(" %") for part in branches.split(",")]
            for part in called:
                for what, value in walk(part).items():
                    found[what] += times * value
        return found

    return walk(entry)


def row(pair: str, machine: str, shape: tuple) -> str:
    devices, peak, memory, speed, link = MACHINES[machine]
    found = measured(compiled(pair, ROWS[pair, machine], shape))
    tokens = ROWS[pair, machine] * PAIRS[pair][1].length
    sent = sum(found[kind] for kind in KINDS)
    held = found["arguments"] + found["temporary"] + found["outputs"]
    seconds = {"compute": found["flops"] / peak, "memory": (found["arguments"] + found["outputs"]) / speed, "links": sent / link}
    wall = max(seconds, key=seconds.get)
    by_kind = ", ".join(f"{kind} {found[kind] / 1e9:.2f}" for kind in KINDS if found[kind] > 5e6)
    return (f"| {shape} | {found['arguments'] / 1e9:.2f} | {found['temporary'] / 1e9:.2f} | {'yes' if held < memory else 'no'} "
            f"| {found['flops'] / 1e12:.2f} | {found['accessed'] / 1e9:.0f} | {by_kind or '-'} | "
            + " | ".join(f"{1e3 * value:.1f}" for value in seconds.values()) + f" | {wall} | {tokens / seconds[wall]:,.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", choices=MACHINES, nargs="*", default=list(MACHINES))
    parser.add_argument("--pair", choices=PAIRS, nargs="*", default=list(PAIRS))
    flags = parser.parse_args()
    for pair in flags.pair:
        for machine in flags.machine:
            print(f"\n**{TITLES[pair]} on {machine}**: {ROWS[pair, machine]} rows of {PAIRS[pair][1].length} tokens an update\n")
            print("| mesh (data, fsdp, model) | arguments, GB | temporary, GB | fits | TFLOP | accessed, GB | sent, GB "
                  "| compute, ms | memory, ms | links, ms | wall | tokens/s at most |\n|" + "---|" * 12, flush=True)
            for shape in MESHES[machine]:
                print(row(pair, machine, shape), flush=True)


if __name__ == "__main__":
    main()
