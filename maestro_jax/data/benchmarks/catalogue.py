"""The benchmarks that can be prepared: their names, who publishes them, which files to have."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from maestro_jax.data.benchmarks import (
    chartqa,
    erqa,
    geometry3k,
    hrbench,
    humaneval_v,
    mathvision,
    microvqa,
    msearth,
    ocrbench,
    slake,
    tallyqa,
    vlmsareblind,
    vstar,
)
from maestro_jax.data.benchmarks.files import Tasks


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One published benchmark.

    Attributes:
      source: `Task.source` of its tasks.
      publisher: where its files are, on Hugging Face unless said.
      files: what has to lie in the folder.
      tasks: folder → split → tasks; empty when it finds none of its files.
    """

    source: str
    publisher: str
    files: str
    tasks: Callable[[Path], Mapping[str, Tasks]]


BENCHMARKS = {
    "chartqa": Benchmark(
        "ChartQA",
        "HuggingFaceM4/ChartQA, or github.com/vis-nlp/ChartQA",
        "data/{train,val,test}-*.parquet, or {train,val,test}/ with *_human.json, *_augmented.json and png/",
        chartqa.tasks,
    ),
    "geometry3k": Benchmark(
        "Geometry3K",
        "hiyouga/geometry3k, or github.com/lupantech/InterGPS",
        "data/{train,validation,test}-*.parquet, or {train,val,test}/NUMBER/ with data.json and img_diagram.png",
        geometry3k.tasks,
    ),
    "microvqa": Benchmark("MicroVQA", "jmhb/microvqa", "data/test-*.parquet (or train-*)", microvqa.tasks),
    "msearthmcq": Benchmark("MSEarthMCQ", "MSEarth/MSEarth_MCQ", "data/train-*.parquet (or test-*)", msearth.tasks),
    "slake": Benchmark(
        "SLAKE", "BoKelvin/SLAKE", "train.json, validation.json, test.json and imgs/ (from imgs.zip)", slake.tasks
    ),
    "tallyqa": Benchmark(
        "TallyQA",
        "github.com/manoja328/TallyQA_dataset, images of COCO and Visual Genome",
        "train.json, test.json and the image folders train2014/, val2014/, VG_100K/, VG_100K_2/",
        tallyqa.tasks,
    ),
    "hrbench_4k": Benchmark(
        "HRBench-4K", "DreamMr/HR-Bench", "hr_bench_4k.parquet or .tsv", partial(hrbench.tasks, resolution="4k")
    ),
    "hrbench_8k": Benchmark(
        "HRBench-8K", "DreamMr/HR-Bench", "hr_bench_8k.parquet or .tsv", partial(hrbench.tasks, resolution="8k")
    ),
    "vstar": Benchmark(
        "VStar",
        "craigwu/vstar_bench",
        "test_questions.jsonl, direct_attributes/ and relative_position/",
        vstar.tasks,
    ),
    "mathvision": Benchmark(
        "MathVision",
        "MathLLMs/MathVision, or github.com/mathllm/MATH-V",
        "data/{test,testmini}-*.parquet, or data/{test,testmini}.jsonl and images/",
        mathvision.tasks,
    ),
    "erqa": Benchmark(
        "ERQA",
        "FlagEval/ERQA, or github.com/embodiedreasoning/ERQA",
        "data/test-*.parquet, or data/erqa.tfrecord",
        erqa.tasks,
    ),
    "ocrbench": Benchmark(
        "OCRBench",
        "echo840/OCRBench, or github.com/Yuliang-Liu/MultimodalOCR",
        "data/test-*.parquet, or OCRBench.json and OCRBench_Images/",
        ocrbench.tasks,
    ),
    "vlmsareblind": Benchmark("VLMsAreBlind", "XAI/vlmsareblind", "data/valid-*.parquet", vlmsareblind.tasks),
    "humaneval_v": Benchmark(
        "HumanEval-V", "HumanEval-V/HumanEval-V-Benchmark", "data/test-*.parquet", humaneval_v.tasks
    ),
}
