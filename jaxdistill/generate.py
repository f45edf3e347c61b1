"""python -m jaxdistill.generate WORKDIR OUT.jsonl [--run=NAME-SEED] [--documents=N ...]: a teacher's text, for students to train on.

Sequence-level distillation (Kim and Rush 2016, arXiv 1606.07947). A finished run of a job, its teacher unless --run names another,
goes on from the beginnings of the documents that the job's headline run trains on. Each line of OUT is a document, {"text": ...} (or as
data.field says);
--config.data.train_path=OUT trains on them, with validation and test as they were.

Document n follows from the seed and n alone; one that reaches --tokens ends in its last whole character. A command that was killed
goes on where it was, and ends in the same bytes.
"""

import argparse
import codecs
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from jaxdistill import UserError, command
from jaxdistill.export import exported

ROUNDING = ("jax", "device")  # of the manifest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"usage: python -m jaxdistill.generate WORKDIR OUT.jsonl [--run=NAME-SEED] [--documents=N ...]: {message}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m jaxdistill.generate", description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--run", default="", help="as in WORKDIR/runs; by default the job's teacher, the first run that fills a key")
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a document's beginning that are kept")
    parser.add_argument("--tokens", type=int, default=0, help="new ones at most; 0: as many as the model has positions for")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token")
    parser.add_argument("--top_p", type=float, default=1.0, help="share of the probability that is drawn from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=32, help="documents at once")
    flags = parser.parse_args(argv)
    for name, least in (("documents", 1), ("prompt", 0), ("tokens", 0), ("temperature", 0), ("seed", 0), ("batch", 1)):
        if not getattr(flags, name) >= least:
            raise UserError(f"--{name}: found {getattr(flags, name)}; accepted: {least} or more")
    if flags.seed >= 2**32:  # the key's bits
        raise UserError(f"--seed: found {flags.seed}; accepted: below 2^32")
    if not 0 < flags.top_p <= 1:
        raise UserError(f"--top_p: found {flags.top_p}; accepted: above 0, and at most 1")
    return flags


def main(argv: list[str]) -> int:
    flags = parse(argv[1:])
    import jax  # here, so that a wrong flag need not wait for it

    from jaxdistill import models
    from jaxdistill.data import text, tokenizer
    from jaxdistill.lock import only_writer
    from jaxdistill.training import distributed, store

    distributed.alone("one process")

    folder, rows = source(flags.workdir, flags.run)
    tok = tokenizer.load(str(folder), "the tokenizer of")
    module, params = models.from_hf(folder)
    most = module.config.length - flags.prompt
    if not 1 <= (flags.tokens or most) <= most:
        raise UserError(f"--prompt, --tokens: found {flags.prompt} and {flags.tokens}; accepted: from 1 new token to as many as the "
                        f"{module.config.length} positions of {flags.run or 'the teacher'} leave")
    wanted = {key: getattr(flags, key) for key in ("documents", "prompt", "temperature", "top_p", "seed", "batch")}
    wanted |= {"field": rows.field, "tokens": flags.tokens or most, "model": store.folder_digest(folder),
               "data": text.load(rows).facts["splits"]["train"], "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    partial = flags.out.with_name(f"{flags.out.name}.partial")
    with only_writer(flags.out.with_name(f".{flags.out.name}.lock"), str(flags.out)):
        if begin(flags.out, partial, wanted):
            print(f"{flags.out}: whole already")
            return 0
        beginnings = [document.text for document in text.training_documents(rows)[: flags.documents]]
        prompts = [[tok.bos, *ids[: flags.prompt].tolist()] for ids in tok.encode(beginnings)]
        try:
            write(partial, module, params, tok, prompts, wanted)
        except KeyboardInterrupt:
            print(f"interrupted; what is written is in {partial}. The same command goes on from there", file=sys.stderr)
            return 130
        partial.replace(flags.out)
    print(f"{flags.out}: {flags.documents:,} documents. To train on them: --config.data.train_path={flags.out}")
    return 0


def source(workdir: Path, run: str) -> tuple[Path, Any]:
    """(the exported folder of the run, by default of the job's teacher; the `data` section of the job's headline run)."""
    from jaxdistill.data import text
    from jaxdistill.diagnosis import records
    from jaxdistill.training import plan

    job = records.load(workdir / "config.json", "the workdir of a job")
    if "runs" not in job:  # a model's folder has a config.json too
        raise UserError(f"{workdir / 'config.json'}: found no job (no runs); accepted: the workdir of a job")
    runs = plan.expand({"mesh": (-1, 1, 1), "cache": ""} | job)  # which are no part of a job
    teachers = [one.id for one in runs if one.spec["fills"]]
    if not run and not teachers:
        raise UserError(f"--run: none given, and no run of {workdir} is a teacher; accepted: {', '.join(one.id for one in runs)}")
    folder = exported(workdir, run or teachers[0])
    chosen = next((one for one in runs if one.name == job["headline"]), runs[-1])
    return folder, chosen.config.data.build(text.TextConfig)


def begin(out: Path, partial: Path, wanted: dict) -> bool:
    """Whether `out` is whole already. The file's manifest, beside it, tells what it is made from; another's is refused."""
    from jaxdistill.diagnosis import records
    from jaxdistill.training import plan
    from jaxdistill.training.metrics import write_json

    manifest = out.with_name(f"{out.name}.manifest")  # no suffix that data.source=jsonl would read
    if manifest.exists():
        found = records.load(manifest, "the file as it was written")
        if out.exists():  # what rounds otherwise matters to what is unfinished alone
            found, wanted = ({key: value for key, value in one.items() if key not in ROUNDING} for one in (found, wanted))
        if keys := plan.difference(found, json.loads(json.dumps(wanted))):
            raise UserError(f"{out}: was begun from something else: {'; '.join(keys[:8])}; accepted: the same command, or another file")
        return out.exists()
    for path in (out, partial):
        if path.exists():
            raise UserError(f"{path}: exists already; accepted: a new file, or one that this command has begun")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(manifest, wanted)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; accepted: a file in a folder that can be written, with room in it") from None
    return False


def write(partial: Path, module, params: dict, tok, prompts: list[list[int]], wanted: dict) -> None:
    """The documents that `partial` lacks. Document n goes on from prompt n, or from the first again when there are no more."""
    import jax
    import numpy as np

    from jaxdistill.models.generation import aligned, generate

    key, batch, documents = jax.random.key(wanted["seed"]), wanted["batch"], wanted["documents"]
    with partial.open("a+b") as file:
        file.seek(0)
        ends = np.cumsum([0] + [len(line) for line in file if line.endswith(b"\n")])
        done = (len(ends) - 1) // batch * batch  # whole batches: what a kill cut short is made again, in the same program
        file.truncate(int(ends[done]))
        since, said, tokens = time.monotonic(), time.monotonic(), 0
        for first in range(done, documents, batch):
            numbers = np.arange(first, first + batch)  # the last batch beyond the end, too: one shape, one program
            given = [prompts[n % len(prompts)] for n in numbers]
            found = jax.device_get(generate(
                module, params, new=wanted["tokens"], key=key, rows=numbers, temperature=wanted["temperature"], top_p=wanted["top_p"],
                eos=tok.eos, vocab=tok.vocab, **aligned(given, wanted["prompt"] + 1),
            ))
            for prompt, ids, mask in list(zip(given, found.tokens, found.mask, strict=True))[: documents - first]:
                unended = mask[-1] and ids[-1] != tok.eos
                ids = [*prompt[1:], *ids[mask & (ids != tok.eos)].tolist()]
                text = cut_off(tok, ids) if unended else tok.decode(ids)
                file.write(json.dumps({wanted["field"]: text}, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            tokens += int(found.mask.sum())
            if time.monotonic() - said > 10 or first + batch >= documents:
                said = time.monotonic()
                print(f"{min(first + batch, documents):>9,}/{documents:,} documents, {tokens / (said - since):,.0f} new tokens/s")


def cut_off(tok, ids: list[int]) -> str:
    """The text of ids after which there was no room: without the bytes at its end that only begin a character. Bytes that no character
    begins with are the model's own, and stay what they decode to."""
    from jaxdistill.data.tokenizer import token_pieces

    pieces, reader = token_pieces(tok), codecs.getincrementaldecoder("utf-8")("replace")
    reader.decode(b"".join(pieces[id] or b" " for id in ids))  # (a special token has no bytes, but is text)
    begun = len(reader.getstate()[0])  # bytes, 3 at most
    while begun and begun >= len(pieces[ids[-1]]):
        begun -= len(pieces[ids[-1]])
        ids = ids[:-1]
    text = tok.decode(ids)
    return text[:-1] if begun else text  # in the last id they may follow others: there they are one U+FFFD


def cli() -> None:
    command(lambda: main(sys.argv))


if __name__ == "__main__":
    cli()
