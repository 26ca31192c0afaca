import gzip
import lzma

import pytest
import zstandard
from forging import RELEASE, elf, module, modules_tree
from hypothesis import given
from hypothesis import strategies as st

from harness.host.kernel_image import KernelError
from harness.host.modules import closure, find_modules, modinfo, read_builtin, read_module

PACKERS = {
    ".ko": bytes,
    ".ko.xz": lzma.compress,
    ".ko.gz": gzip.compress,
    ".ko.zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize(("suffix", "pack"), PACKERS.items(), ids=PACKERS)
def test_a_module_is_read_however_it_is_packed(tmp_path, suffix, pack):
    path = tmp_path / f"kvm-amd{suffix}"
    path.write_bytes(pack(module("kvm_amd", ["kvm", "ccp"])))
    assert find_modules(tmp_path) == {"kvm_amd": path}
    assert read_module(path) == module("kvm_amd", ["kvm", "ccp"])
    assert modinfo(path)["depends"] == "kvm,ccp"


@pytest.mark.parametrize(("suffix", "pack"), list(PACKERS.items())[1:], ids=list(PACKERS)[1:])
def test_a_packed_module_cut_short_is_one_line(tmp_path, suffix, pack):
    path = tmp_path / f"kvm{suffix}"
    path.write_bytes(pack(module("kvm"))[:-9])
    with pytest.raises(KernelError, match="cannot be read") as error:
        read_module(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"text", "no ELF image"),
        (elf(), "names no kernel"),
        (elf()[:90], "damaged ELF"),
        (module("kvm")[:70], "damaged ELF"),
    ],
)
def test_a_file_that_is_no_module_is_one_line(tmp_path, data, words):
    path = tmp_path / "kvm.ko"
    path.write_bytes(data)
    with pytest.raises(KernelError, match=words):
        modinfo(path)


def names(paths):
    return [p.name.removesuffix(".ko") for p in paths]


def close(tree, wanted, optional=(), release=RELEASE):
    return names(closure(release, find_modules(tree), read_builtin(tree), wanted, optional))


@pytest.fixture
def tree(tmp_path):
    return modules_tree(
        tmp_path,
        {
            "irqbypass": [],
            "kvm": ["irqbypass"],
            "ccp": [],
            "kvm-amd": ["kvm", "ccp"],
            "virtio_pci": ["virtio"],
            "half": ["absent"],
        },
        builtin=["virtio", "virtio-ring"],
    )


def test_dependencies_come_first(tree):
    assert close(tree, ["kvm_amd"]) == ["irqbypass", "kvm", "ccp", "kvm-amd"]


def test_names_take_dashes_and_underscores_alike(tree):
    assert close(tree, ["kvm-amd"]) == close(tree, ["kvm_amd"])


def test_a_module_wanted_twice_comes_once(tree):
    assert close(tree, ["irqbypass", "kvm_amd", "kvm"]).count("kvm") == 1


def test_built_in_modules_need_no_file(tree):
    assert close(tree, ["virtio_pci", "virtio_ring"]) == ["virtio_pci"]


def test_optional_modules_are_taken_when_they_are_there(tree):
    assert close(tree, ["kvm"], ["ccp", "nothing", "virtio"]) == ["irqbypass", "kvm", "ccp"]


def test_a_missing_module_is_named(tree):
    with pytest.raises(KernelError, match=f"kernel {RELEASE} has no module nothing$"):
        close(tree, ["nothing"])


def test_a_missing_dependency_names_who_needs_it(tree):
    with pytest.raises(KernelError, match=r"no module absent \(which half depends on\)"):
        close(tree, ["half"])


def test_without_modules_builtin_a_missing_module_says_so(tree):
    (tree / "modules.builtin").unlink()
    with pytest.raises(KernelError, match=r"without modules\.builtin"):
        close(tree, ["virtio"])


def test_modules_of_another_kernel_are_refused(tree):
    with pytest.raises(KernelError, match=f"built for kernel {RELEASE}, not for 6.9.9"):
        close(tree, ["kvm"], release="6.9.9")


def test_modules_that_need_each_other_are_an_error(tmp_path):
    tree = modules_tree(tmp_path, {"a": ["b"], "b": ["a"]})
    with pytest.raises(KernelError, match="a -> b -> a"):
        close(tree, ["a"])


def test_an_updated_module_hides_the_distributions(tree):
    (tree / "updates").mkdir()
    (tree / "updates/kvm.ko").write_bytes(module("kvm"))
    assert find_modules(tree)["kvm"] == tree / "updates/kvm.ko"
    assert close(tree, ["kvm_amd"]) == ["kvm", "ccp", "kvm-amd"]


def test_a_tree_without_modules_builtin_does_not_say_what_is_built_in(tmp_path):
    assert read_builtin(tmp_path) is None


@st.composite
def graphs(draw):
    """Modules that depend only on earlier ones, in a drawn order."""
    count = draw(st.integers(1, 8))
    order = draw(st.permutations([f"m{i}" for i in range(count)]))
    return {
        name: draw(st.lists(st.sampled_from(order[:i]), unique=True)) if i else []
        for i, name in enumerate(order)
    }


@given(graph=graphs(), data=st.data())
def test_a_closure_is_complete_minimal_and_in_order(tmp_path_factory, graph, data):
    tree = modules_tree(tmp_path_factory.mktemp("tree"), graph)
    wanted = data.draw(st.lists(st.sampled_from(sorted(graph)), min_size=1))
    order = close(tree, wanted)
    reachable, todo = set(), list(wanted)
    while todo:
        name = todo.pop()
        reachable.add(name)
        todo += graph[name]
    assert sorted(order) == sorted(reachable)
    for name in order:
        assert all(order.index(need) < order.index(name) for need in graph[name])
