import re

import pytest
from click.testing import CliRunner

from harness.commands.kernel import command
from harness.host import kernel_build
from harness.host.kernel_build import (
    VARIANTS,
    Variant,
    _link_tree,
    _patch,
    _require_tools,
    failed_hunk,
    find_variant,
    series_of,
    variants,
)
from harness.host.kernel_image import KernelError
from harness.host.kernels import resolve
from harness.host.modules import find_modules

SHIPPED = [
    pytest.param(variant, id=f"{series.name}-{name}")
    for series in sorted(VARIANTS.iterdir())
    for name, variant in variants(series.name).items()
]

NAMED = re.compile(r"\d+\.\d+")

PATCH = """Say two

--- a/arch/x86/kvm/svm/svm.c
+++ b/arch/x86/kvm/svm/svm.c
@@ -1,3 +1,3 @@
 first
-one
+two
 last
"""


@pytest.mark.parametrize("variant", SHIPPED)
def test_a_shipped_variant_says_what_it_does_and_changes_kvm_only(variant):
    assert re.fullmatch(r"\S.{10,90}\w", variant.summary)
    assert variant.files
    assert all(file.startswith(("arch/x86/kvm/", "virt/kvm/")) for file in variant.files)


@pytest.mark.parametrize("variant", SHIPPED)
def test_a_variant_names_series_that_it_applies_to_beside_its_own(variant):
    assert all(NAMED.fullmatch(series) for series in variant.also)
    for series in series_of(variant.name):
        assert variants(series)[variant.name].name == variant.name


def test_a_variant_made_for_a_series_goes_before_one_that_also_applies(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_build, "VARIANTS", tmp_path)
    for series, text in (
        ("6.1", "Old\n\nAlso: 6.12, 7.3\n\n--- a/x\n"),
        ("6.12", "New\n\n--- a/x\n"),
    ):
        (tmp_path / series).mkdir()
        (tmp_path / series / "bug.patch").write_text(text)
    assert [variants(series)["bug"].summary for series in ("6.1", "6.12", "7.3")] == [
        "Old",
        "New",
        "Old",
    ]
    assert series_of("bug") == ["6.1", "6.12", "7.3"]
    assert variants("5.10") == {}


@pytest.mark.parametrize(
    ("file", "amd_only"),
    [
        ("arch/x86/kvm/svm/nested.c", True),
        ("arch/x86/kvm/x86.c", False),
        ("virt/kvm/kvm_main.c", False),
    ],
)
def test_kvm_is_built_only_if_it_is_patched(file, amd_only):
    text = (
        f"--- a/arch/x86/kvm/svm/svm.c\n+++ b/arch/x86/kvm/svm/svm.c\n--- a/{file}\n+++ b/{file}\n"
    )
    assert Variant("v", text).amd_only is amd_only


def test_a_variant_may_be_ones_own_file(tmp_path):
    path = tmp_path / "mine.patch"
    path.write_text(PATCH)
    assert find_variant("6.1", str(path)) == Variant("mine", PATCH)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PATCH.replace("arch/x86/kvm/svm/svm.c", "mm/slab.c"), "it changes mm/slab.c; only"),
        ("no patch at all\n", "no file is changed"),
    ],
)
def test_a_file_that_is_no_patch_to_kvm_is_refused(tmp_path, text, words):
    path = tmp_path / "mine.patch"
    path.write_text(text)
    with pytest.raises(KernelError, match=words):
        find_variant("6.1", str(path))


@pytest.mark.parametrize(
    ("name", "words"),
    [("nope", "no variant 'nope' for 6.1; there are: .*eager"), ("/no/x.patch", "No such file")],
)
def test_a_variant_that_is_not_there_is_one_line(name, words):
    with pytest.raises(KernelError, match=words):
        find_variant("6.1", name)


def test_a_patch_is_applied(tmp_path):
    _patch(source(tmp_path, "first\none\nlast\n"), Variant("v", PATCH))
    assert (tmp_path / "arch/x86/kvm/svm/svm.c").read_text() == "first\ntwo\nlast\n"


def test_a_hunk_that_does_not_apply_is_named(tmp_path):
    with pytest.raises(KernelError) as error:
        _patch(source(tmp_path, "another\nfile\n"), Variant("v", PATCH))
    said = "variant v: arch/x86/kvm/svm/svm.c: hunk 1 does not apply at line 1"
    assert str(error.value) == said


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(KernelError, match="not there"):
        _patch(tmp_path, Variant("v", PATCH))


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("patching file a.c\nHunk #2 FAILED at 31.\n", "a.c: hunk 2 does not apply at line 31"),
        (
            "patching file a.c\nReversed (or previously applied) patch detected!",
            "a.c: hunk 1 does not apply, or",
        ),
        ("patch: **** malformed patch at line 7\n", "patch: **** malformed patch at line 7"),
    ],
)
def test_what_patch_says(output, said):
    assert failed_hunk(output).startswith(said)


def test_what_is_built_hides_the_archives(tmp_path):
    own, archive = tmp_path / "kvm-amd.ko", tmp_path / "archive"
    own.write_text("own")
    for name in ("kernel/arch/x86/kvm/kvm-amd.ko.xz", "kernel/arch/x86/kvm/kvm.ko", "kernel/readme",
                 "modules.builtin"):  # fmt: skip
        path = archive / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    tree = tmp_path / "tree"
    _link_tree(archive, [own], tree)
    found = find_modules(tree)
    assert {name: path.read_text() for name, path in found.items()} == {
        "kvm_amd": "own",
        "kvm": "kernel/arch/x86/kvm/kvm.ko",
    }
    assert (tree / "modules.builtin").read_text() == "modules.builtin"


def test_missing_tools_are_named(monkeypatch):
    monkeypatch.setattr(kernel_build, "_TOOLS", ("sh", "no-such-make"))
    with pytest.raises(KernelError, match="needs no-such-make: not installed"):
        _require_tools()


def test_a_variant_and_modules_exclude_each_other(tmp_path):
    with pytest.raises(KernelError, match="--modules goes with the path"):
        resolve("6.1:eager", tmp_path)


def test_the_variants_of_a_series_are_listed():
    done = CliRunner().invoke(command, ["variants", "--from", "6.1"])
    assert done.exit_code == 0
    assert "eager  " in done.output
    assert "none for 4.9" in CliRunner().invoke(command, ["variants", "--from", "4.9"]).output


def source(root, text):
    path = root / "arch/x86/kvm/svm/svm.c"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return root
