"""Kill -9 at random moments, broken images by the hundred, an S3 store with faults: the rows at the end, against those of an undisturbed run.

    python benchmarks/kills.py --images 10000 --moments 20
    python benchmarks/kills.py --images 10000 --moments 0 --s3-faults 0.05

Prints a table of Markdown. Needs an rclone beside the interpreter for `--s3-faults`.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import broken_images  # noqa: E402
import killing  # noqa: E402


def write_model(uri: str) -> None:
    """A small network with random weights: which rows there are does not depend on what it learned."""
    import torch

    from models.architectures import build
    from models.config import ModelConfig, Transform
    from models.directory import save

    torch.manual_seed(0)
    config = ModelConfig(architecture="resnet8", options={"width": 4}, transform=Transform(size=28, resize=32))
    save(uri, build(config, 4), config=config, class_names=list("abcd"), metrics={}, provenance={})


def write_source(folder: Path, images: int, per_shard: int, slow: int) -> dict[tuple[str, int], str]:
    """Tars of images, a tenth of them broken; returns the reasons of the broken ones."""
    folder.mkdir(parents=True)
    expected: dict[tuple[str, int], str] = {}
    for number, rows in enumerate(broken_images.shards(0, images, per_shard, 0.1, slow)):
        name = f"{number:05d}.tar"
        (folder / name).write_bytes(broken_images.tar([data for data, _ in rows]))
        expected |= {(name, index): reason for index, (_, reason) in enumerate(rows) if reason is not None}
    return expected


def check_broken(uri: str, images: int, expected: dict[tuple[str, int], str]) -> str:
    """Whether every good image has a row and every broken one its true reason."""
    found = {(shard, index): reason for shard, index, reason in killing.rejects(uri) if index is not None}
    rows = killing.table(uri).num_rows
    wrong = {key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)}
    return (
        f"{images} images, {len(expected)} broken: {rows} scored, {len(found)} rejected, {len(wrong)} of them wrongly"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--per-shard", type=int, default=200)
    parser.add_argument("--slow", type=int, default=5, help="images of each way to take forever")
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument(
        "--s3-faults", type=float, default=0.0, help="share of requests; then one run, read from and written to S3"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tophat-kills-") as name:
        os.environ["HOME"] = name  # Ray's token
        import cluster

        os.environ.update(cluster.ENVIRONMENT)
        work = Path(name)
        expected = write_source(work / "u", given.images, given.per_shard, given.slow)
        write_model(str(work / "teacher"))
        with killing.Fleet() as fleet:
            begin = time.monotonic()
            command = command_of(work, str(work / "u"), str(work / "undisturbed"))
            fleet.score(command)
            whole = time.monotonic() - begin
            print(check_broken(str(work / "undisturbed"), given.images, expected), flush=True)
            if given.moments:
                kill(fleet, work, whole, given.moments, given.seed)
        if given.s3_faults:
            faults(work, given.s3_faults, given.seed)


def command_of(work: Path, source: str, out: str) -> list[str]:
    settings = (
        "classes_per_image=3",
        "batch_size=32",
        "actors=1",
        "cpus_per_actor=0.5",
        "range_mib=1",
        "decode_seconds=0.3",
    )
    sets = [part for setting in settings for part in ("--set", setting)]
    return ["--model", str(work / "teacher"), "--source", source, "--out", out, *sets]


def kill(fleet: killing.Fleet, work: Path, whole: float, moments: int, seed: int) -> None:
    """The table: a row for each kill."""
    rng = random.Random(seed)
    expected, broken = killing.table(str(work / "undisturbed")), killing.rejects(str(work / "undisturbed"))
    print(f"\nUndisturbed: {whole:.0f} s, {expected.num_rows} rows\n\n| killed | after s | commands | rows | same |")
    print("| --- | ---: | ---: | ---: | --- |", flush=True)
    for moment in range(moments):
        out = str(work / f"killed-{moment}")
        kind = killing.KINDS[moment % len(killing.KINDS)]
        outcome = fleet.score_killed(command_of(work, str(work / "u"), out), kind, rng.uniform(0, whole))
        got = killing.table(out)
        rejected = killing.rejects(out)
        same = got.equals(expected) and rejected == broken
        what = outcome.kind or f"none (the {kind} had ended)"
        print(
            f"| {what} | {outcome.seconds:.1f} | {outcome.attempts} | {got.num_rows} | {'yes' if same else 'NO'} |",
            flush=True,
        )
        if not same:
            print(f"rejects that differ: {sorted({*rejected} ^ {*broken}, key=repr)[:5]}", flush=True)


def faults(work: Path, share: float, seed: int) -> None:
    """One run from and to an S3 server behind a faulty proxy, on a Ray of its own."""
    from cluster import storage
    from faulty_proxy import faulty_proxy

    with killing.s3_server(work / "s3") as port:
        for file in sorted((work / "u").iterdir()):
            storage.publish(f"s3://bucket/u/{file.name}", file)
        with (
            faulty_proxy(port, share, seed, stall=5.0) as proxy,
            killing.environment(AWS_ENDPOINT_URL=proxy.url, TOPHAT_S3_TIMEOUT="2"),
        ):
            begin = time.monotonic()
            out = "s3://bucket/scores"
            killing.score_alone(command_of(work, "s3://bucket/u", out))
            seconds = time.monotonic() - begin
        got = killing.table(out)
    same = got.equals(killing.table(str(work / "undisturbed")))
    print(
        f"\nS3, {share:.0%} faults: {proxy.requests} requests, {dict(proxy.injected)}, {seconds:.0f} s, {got.num_rows} rows, ",
        end="",
    )
    print("the same" if same else "NOT the same", flush=True)


if __name__ == "__main__":
    main()
