#!/usr/bin/env python3
"""What of FactorLLM's recipe helps? The bundled model, equal steps, three seeds.

    python3 bench/ablation.py [--cleave build/bin/cleave] [--steps 40] [--seeds 3] [--out out/ablation]

Every row is converted (8 experts, 4 active), tuned on text of one generator seed and evaluated on the
bundled sample, which comes from another. The seed changes the partition, random routers and the order
of the windows. Prints a Markdown table (mean and spread of KL to the dense model, mean perplexity).
"""
import argparse
import concurrent.futures
import json
import pathlib
import statistics
import subprocess
import sys
import threading

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples/models/demo-llama"

# name: (options of convert beside the calibration, calibrated, options of train or None)
ROWS = {
    "converted, not tuned": ([], True, None),
    "default: joint, PA 0.05 KL(p‖q), per-expert labels, Switch 0.01, softmax": ([], True, []),
    "PA off": ([], True, ["--pa-weight", "0"]),
    "PA as KL(q‖p)": ([], True, ["--pa-form", "target-first"]),
    "PA as cross-entropy": ([], True, ["--pa-form", "ce"]),
    "exhaustive labels": ([], True, ["--labels", "exhaustive"]),
    "balance 0": ([], True, ["--balance-weight", "0"]),
    "the paper's balance loss": ([], True, ["--balance", "paper"]),
    "hard gate": (["--gate", "hard"], True, []),
    "hard gate, straight-through": (["--gate", "hard"], True, ["--straight-through"]),
    "router only": ([], True, ["--phase", "router"]),
    "experts only": ([], True, ["--phase", "experts"]),
    "router, then joint": ([], True, ["--phase", None]),
    "random router, not tuned": ([], False, None),
    "random router, default": ([], False, []),
    "random router, PA off": ([], False, ["--pa-weight", "0"]),
    "random router, router only": ([], False, ["--phase", "router"]),
    "random router, router only, exhaustive labels":
        ([], False, ["--phase", "router", "--labels", "exhaustive"]),
}


def run(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return json.loads(done.stdout)


def measure(args, name, seed):
    convert, calibrated, train = ROWS[name]
    work = args.out / f"work-{threading.get_ident()}"
    work.mkdir(exist_ok=True)
    split, tuned = work / "split", work / "tuned"
    common = ["--json", "--quiet", "--overwrite", "--seed", seed, "--threads", 1]
    calibration = ["--calibration", args.text, "--context", 256] if calibrated else []
    run([args.cleave, "convert", MODEL, split, "--experts", 8, "--active", 4, *convert, *calibration,
         *common])
    if train is not None:
        steps = args.steps
        phase = f"router:{steps // 4},joint:{steps - steps // 4}"
        options = [phase if o is None else o for o in train]
        run([args.cleave, "train", split, tuned, "--data", args.text, "--steps", steps, "--batch", 4,
             "--context", 256, "--lr", "1e-3", "--warmup", 5, "--eval-every", 0, "--eval-tokens", 512,
             "--held-out-windows", 1, *options, *common])
    return run([args.cleave, "eval", split if train is None else tuned, "--text", MODEL / "sample.txt",
                "--against", MODEL, "--context", 256, "--limit-tokens", 16384, "--json", "--quiet",
                "--threads", 1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cleave", type=pathlib.Path, default=ROOT / "build/bin/cleave")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out/ablation")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.text = args.out / "train.txt"
    subprocess.run([sys.executable, ROOT / "scripts/demo_data.py", "--seed", "3", "--bytes", "1000000",
                    "--out", args.text], check=True, stdout=subprocess.DEVNULL)
    results = {}
    pool = concurrent.futures.ThreadPoolExecutor(args.jobs)
    jobs = {name: [pool.submit(measure, args, name, seed) for seed in range(args.seeds)]
            for name in ROWS}
    print(f"| {args.steps} steps of 4 x 256 tokens, lr 1e-3, {args.seeds} seeds | KL | spread | perplexity "
          "| top-1 |\n|---|---|---|---|---|")
    for name in ROWS:
        results[name] = [job.result() for job in jobs[name]]
        kl = [r["kl"] for r in results[name]]
        mean = lambda key: statistics.fmean(r[key] for r in results[name])
        print(f"| {name} | {statistics.fmean(kl):.4f} | {max(kl) - min(kl):.4f} "
              f"| {mean('perplexity'):.4f} | {mean('top1_agreement'):.3f} |", flush=True)
    (args.out / "ablation.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
