"""The pages: their commands run or pass their parser, their links and pictures are there, both languages agree."""
import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, run, untrained_checkpoint
from markdown_it import MarkdownIt

from fcn8s import BACKBONES, DEFAULT_BACKBONE
from voc import CLASSES

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TRANSLATIONS = [("README.md", "README.zh-CN.md"), ("docs/ascend.md", "docs/ascend.zh-CN.md")]
SCRIPTS = {"run_1p.sh": "train", "run_8p.sh": "train"}
PARSED = ("train", "evaluate", "predict", "export", "convert_voc_aug")  # the commands with a parser of their own
LONGEST_PICTURE = 200_000  # bytes
LONGEST_SENTENCE = 25  # words


def tokens(page):
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def fences(page):
    """[(language, content)] of the fenced code blocks as they render."""
    return [(token.info, token.content) for token in tokens(page) if token.type == "fence"]


def commands(page):
    return [line for language, content in fences(page) if language == "bash" for line in content.splitlines()]


def inline(page):
    """The parts of the prose as they render: texts, inline code, links, pictures."""
    return [child for token in tokens(page) if token.type == "inline" for child in token.children]


ALL = sorted({command for page in PAGES for command in commands(page)})
LOCAL = [command for command in ALL if re.match(r"python (predict|evaluate|export)\.py output/", command)
         and "--device_list" not in command]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_in_fences_with_a_language(page):
    assert all(language in ("bash", "python", "text", "sh", "yaml") for language, _ in fences(page))
    assert not [token for token in tokens(page) if token.type == "code_block"]  # indented
    for text in (child.content for child in inline(page) if child.type == "text"):
        assert not re.search(r"--\w|\b(python3?|bash|pip|torchrun) \S+\.(py|sh|txt)\b", text), text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page):
    targets = [child.attrs.get("href") or child.attrs.get("src") for child in inline(page)
               if child.type in ("link_open", "image")]
    for target in (target for target in targets if "://" not in target):
        path, _, anchor = target.partition("#")
        assert (page.parent / path).is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (page.parent / path).read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        if path.endswith(".png"):
            assert (page.parent / path).stat().st_size <= LONGEST_PICTURE


@pytest.mark.parametrize("page", [page for page in PAGES if "zh-CN" not in page.name], ids=lambda page: page.name)
def test_sentences_are_short(page):
    for token in tokens(page):
        if token.type == "inline":
            text = "".join(child.content if child.type in ("text", "code_inline") else " " for child in token.children)
            for sentence in re.split(r"(?<=[.?!])\s|(?<=:)\s", text):
                assert len(sentence.split()) <= LONGEST_SENTENCE, sentence


@pytest.fixture(scope="module")
def clone(drawn_voc, tmp_path_factory):
    """A folder like a clone's after its user did what the pages take for granted."""
    folder = tmp_path_factory.mktemp("clone")
    untrained_checkpoint(folder / "output/0/FCN/ckpt/best.pth", CLASSES)
    untrained_checkpoint(folder / "output/my_data/ckpt/best.pth", CLASSES)
    (folder / "data/VOCdevkit").mkdir(parents=True)
    (folder / "data/VOCdevkit/VOC2012").symlink_to(drawn_voc)
    (folder / "my_data").symlink_to(drawn_voc)
    shutil.copytree(drawn_voc / "JPEGImages", folder / "my_photos")
    return folder


@pytest.mark.parametrize("command", LOCAL)
def test_local_commands_run(command, clone):
    words = shlex.split(command)
    run(ROOT / words[1], *words[2:], "--device", "cpu", cwd=clone) if words[1] != "export.py" else run(
        ROOT / words[1], *words[2:], cwd=clone)


@pytest.mark.parametrize("command", ALL)
def test_commands_pass_their_parser(command):
    words = shlex.split(command)
    script = next((word for word in words if word.endswith((".py", ".sh"))), None)
    if script is None or not (ROOT / script).is_file():
        assert words[0] in ("git", "cd", "pip", "npu-smi", "source", "python3", "printf") or "labelme2voc.py" in words
        assert "-r" not in words or (ROOT / words[-1]).is_file()
        return
    name = SCRIPTS.get(script, Path(script).stem)
    if "--val" in words:
        name, words = "evaluate", [word for word in words if word != "--val"]
        words.append("latest.pth")
    arguments = words[words.index(script) + 1:]
    if script == "run_1p.sh" and not any("--data_path" in word for word in arguments):
        arguments += ["--data_path", "drawn"]  # as the script adds it
    if script == "run_8p.sh":
        arguments = ["--device_list", "0,1,2,3,4,5,6,7", *arguments]
    if name in PARSED:
        importlib.import_module(name).parse_args(arguments)


@pytest.mark.parametrize("english, chinese", TRANSLATIONS)
def test_both_languages_have_the_same_code_and_pictures(english, chinese):
    english, chinese = ROOT / english, ROOT / chinese
    assert [code for code in fences(english) if code[0] != "text"] == [
        code for code in fences(chinese) if code[0] != "text"]
    for kind in ("image", "heading_open", "tr_open"):
        counts = [sum(token.type == kind for token in (*tokens(page), *inline(page))) for page in (english, chinese)]
        assert counts[0] == counts[1], kind
    prose = "".join(child.content for child in inline(chinese) if child.type == "text")
    assert not re.search(r"[\u4e00-\u9fff][,;:!?()]", prose) and "，" in prose and "。" in prose


def test_every_flag_that_a_page_names_is_there():
    known = "".join(run(ROOT / f"{name}.py", "--help").stdout for name in PARSED)
    known += (ROOT / "tools/benchmark.py").read_text() + (ROOT / "tools/stress.py").read_text()
    others = {"--peers", "--val", "--labels", "--nproc_per_node", "--help", "--noheader", "--python", "--shm",
              "--nodes", "--ntasks", "--cpus", "--gres", "--signal", "--requeue"}  # the second line: of sbatch
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z_]+", page.read_text()))
        missing = {flag for flag in named - others if flag not in known}
        assert not missing, f"{page.name}: {missing}"


def row(page, start):
    """The table row of a page that begins with a text; "" if there is none."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if line.startswith(f"| {start}")), "")


def test_the_memory_of_a_backbone_is_the_same_on_each_page():
    """Of each backbone that one of the pages names: a new one in the table needs no row on a page."""
    rows = {name: [row("docs/own-data.md", f"`{name}` | mixed |"), row("README.md", f"`{name}`"),
                   row("README.zh-CN.md", f"`{name}`")] for name in BACKBONES}
    named = {name: found for name, found in rows.items() if any(found)}
    assert DEFAULT_BACKBONE in named
    for name, (memory, *readmes) in named.items():
        assert memory and all(memory.strip("| ").rpartition("| ")[2] in readme for readme in readmes), name


def test_each_row_of_what_was_tried_names_its_tests():
    rows = (ROOT / "docs/reliability.md").read_text().split("| --- | --- | --- |\n")[1].split("\n\n")[0].splitlines()
    for named in (re.findall(r"`(\w+\.py)`: ([^;|]+)", line) for line in rows):
        for file, tests in named:
            text = (ROOT / "tests" / file).read_text()
            assert all(f"\ndef test_{name}(" in text for name in re.findall(r"`(\w+)`", tests)), tests
        assert named


def test_the_table_of_speed_was_measured():
    text = (ROOT / "docs/speed.md").read_text()
    rows = text.split("<!-- speed -->")[1].split("<!-- end of speed -->")[0].strip().splitlines()
    assert rows[0].startswith("Commit ") and len(rows) > 10


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
