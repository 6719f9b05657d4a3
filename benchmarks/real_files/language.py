"""Thai text, which has no spaces: where its words end."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.real_files.case import Array, Feeds, SampleCase

# common words that are no parts of each other's usual compounds; any order of them is text of a kind
THAI = tuple(
    """
    ฉัน เขา เธอ เรา พวกเขา คุณ แม่ พ่อ ลูก เพื่อน ครู นักเรียน หมอ ตำรวจ ทหาร ชาวนา เด็ก ผู้หญิง ผู้ชาย คน
    กิน ดื่ม เดิน วิ่ง นอน อ่าน เขียน พูด ฟัง ดู ซื้อ ขาย ทำงาน เรียน สอน เล่น ช่วย ชอบ รัก เกลียด กลัว รู้จัก
    คิด จำ ลืม เปิด ปิด ให้ รับ ส่ง หา พบ รอ ใช้ ต้องการ อยาก สามารถ ควร ต้อง กำลัง เคย จะ ได้ ไม่ และ หรือ แต่
    เพราะ ถ้า เมื่อ จาก ถึง กับ ใน บน ใต้ ของ ที่ ว่า ก็ แล้ว มาก น้อย ดี เลว ใหญ่ เล็ก สวย ร้อน หนาว เร็ว ช้า ใหม่ เก่า
    บ้าน โรงเรียน โรงพยาบาล ตลาด ร้านอาหาร ธนาคาร ถนน รถยนต์ เครื่องบิน เรือ ทะเล ภูเขา แม่น้ำ ต้นไม้ ดอกไม้ สุนัข แมว
    นก ปลา ข้าว น้ำ กาแฟ หนังสือ โทรศัพท์ คอมพิวเตอร์ เงิน เวลา วันนี้ พรุ่งนี้ เมื่อวาน ปี เดือน สัปดาห์ ประเทศ รัฐบาล
    เศรษฐกิจ การเมือง สังคม วัฒนธรรม ภาษา ปัญหา โครงการ บริษัท ประชาชน จังหวัด กรุงเทพ อากาศ สุขภาพ ความสุข
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class WordEnds(SampleCase):
    """AttaCut on characters: F1 of the places where words begin."""

    def sample(self, rng: np.random.Generator) -> tuple[Feeds, np.ndarray]:
        words = [THAI[k] for k in rng.integers(len(THAI), size=int(rng.integers(12, 30)))]
        text = "".join(words)
        begins = np.zeros(len(text), bool)
        begins[np.cumsum([0, *map(len, words[:-1])])] = True
        known = self.characters()
        return {"input": np.array([[known.get(sign, known["<UNK>"]) for sign in text]], dtype=np.int64)}, begins

    def answer(self, outputs: Sequence[Array]) -> np.ndarray:
        return np.asarray(outputs[0] > 0)  # logits: a share above one half

    def judge(self, told: list[tuple[np.ndarray, np.ndarray]]) -> float:
        # the first character begins a word whatever the net says
        hits = sum(int((found & truth)[1:].sum()) for found, truth in told)
        return 2 * hits / sum(int(found[1:].sum() + truth[1:].sum()) for found, truth in told)

    def characters(self) -> dict[str, int]:
        """Character -> number, a file beside the net."""
        held: dict[str, int] = json.loads(self.path.with_name("attacut-c-characters.json").read_text("utf-8"))
        return held
