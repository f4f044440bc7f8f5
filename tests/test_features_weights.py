"""Files of weights: PyTorch, NumPy and safetensors files are read, and no code in a file is executed."""

import base64
import collections
import hashlib
import io
import os
import pickle
import resource
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save

from sr3_jax.errors import UserError
from sr3_jax.features.weights import read_arrays, read_file

# Files of PyTorch 2.13 (b85 of zlib), in its current and its old format (_use_new_zipfile_serialization=False), of
# OrderedDict([("a.weight", arange(6.).reshape(2, 3).t()), ("a.count", tensor(7)),
#              ("b.bias", nn.Parameter(tensor([0.5, -1.5])))]).
TORCH_ZIP = (
    "c-o~@&u`LD9DglPpz{}sj`?GHWQleK3Y5d#Y)qr6iHI>FyO2^UG#1J$k4-%-F`MqDo;(@-D~u;S?e1kKZypv8#>79s_+AUFEwJf)"
    ";qgNGem>vN>-YQlmX%N#fLIKSEf%D}<Hd%GRIdBTl%*tCov=1&O|wi>*N|a#dhA`hq1$@nrlBDgf`tmC(pAE(a_hR$Y#~T%$g;H-"
    "SL-9g?6EalulEhJQA2vCXW6y2EDJ;FbTx`GJshbvbr^ObtZZ5;y6-+@VWdjo7#=d!5I(hTA4U}h!Pq?oC?SR3f^mgXLR*mCZV??b"
    "2p+4z;|{UPX;#03;E5Ja)f&>@u{zBW`$>mA15dT03WZ<-vo0*SOs5e%Q-R4Ug9GYZ-B5e*?37D&Ra<TANVi#d&dt?wWoO|mCZ-Wg"
    "5xMjxoKvVxc-~EL0l|wEc<F`nWBxh3T!B~mTv>_6e&5=O8yHV^d1~PjPT{zRmfcoSZB4g(xHQx1mm$0#etvyMWRX3cHwl&q@1QI-"
    ")ij!&w%$RqRGLWrSF0cp0n6*~JB?G&2MU-05iFqo1nCxOGg+d*s%ao(>V#u+>DwHs33DJv41@<=y~xYb@ae`f{#wBwyf^TEw?Y_a"
    "U+%q1;XhJ`FlL908Cl}~@l`|zEF@odch8DBj0fkFhWWCxbp7bB-dUIs-~IC^lE1yZzI%B7IJklHkJ@VK{{-Y%lKIQq=7YoQp8_Ij"
    "K<DZ`-8OIsK2^!wsTmDf5{@K<7lo1_ilR^~74p0w7IS%?7xRKp$P|hNzEms-g&d#H5tYAwyx&P<9cf1;MLX3P==55X9aFwPM}s)8"
    "^%6eJM+%JFI0*L|C+VL8G??htAcNO7Gd_mb4#UW9L7>+i{$lOYVC1nN%G=|9R5~<5Wr8SgXZlfZ_EFg&%G*_Oe<y{(eh&v>-ZH2B"
    "Z^VI3Zosm_Fjoh0^Py`VyZFxp?Ve&}Xne+*0k;Q}z@5Pn#>K>)csKSBtOJk+"
)
TORCH_OLD = (
    "c-nQ6%Wl*#6owrqlW7et1<IvdyUc8&VLBsbR&;^7G1sv121S{SHF1^3a~!7#q)M}CDLexUmb?YL4v&Duf|E%pT@03;=p6q(-}&Rr"
    ">1USz{<8OLd;i<3t#D4C|8((r1SAj}gpirhR;N0T52Y!UF2F&7Si_xMS)0pP788{eKu-n3q<ue=aj8DY65J#30@1=`nQ3F8#i?*H"
    "QiTPdd%~-0=wb?O?o|~sQ^e#lwMZ%1OEZy1PM)gNG9aA@oItGLi6nd{)ikp}Q>#syg>hw7Ub5K8ai#J}Y-Leu6Cd^%xIrM=H6NA9"
    "RD#zWVSBkw?3*UZpe5E(GwKhAy+QZ!;8AyH&;x(bYC5a1JO71+mDikbm(vqi<qmgGfPKp9t}a=)9KqTGlZ2_R(A;{4;OsB#8CpDN"
    "UHQlA_mI@x8TMf#YjXz~SCP@_G<C08xE{f#@KHVv$0{k|#(xaY5|bQAD-DC24LNIF#B@ia(Eu^G5JM4jyS74)VT(J*aHqlDwQw(j"
    "`=^WG!AE!)!FGKmZ|mP+NiAoY54!9_x-z8Xd^{oK$9Lx}XrH}(a&gR2Lw0fEn&bMq`v-B4tho"
)


def unpacked(text):
    return zlib.decompress(base64.b85decode(text))


@pytest.mark.parametrize("text", [TORCH_ZIP, TORCH_OLD], ids=["zip", "before 1.6"])
def test_pytorch_files_are_read(text):
    arrays = read_arrays(unpacked(text), "file")
    assert list(arrays) == ["a.weight", "a.count", "b.bias"]
    np.testing.assert_array_equal(arrays["a.weight"], [[0, 3], [1, 4], [2, 5]])
    assert arrays["a.weight"].dtype == np.float32
    assert arrays["a.count"] == 7 and arrays["a.count"].dtype == np.int64
    np.testing.assert_array_equal(arrays["b.bias"], [0.5, -1.5])


def test_pytorch_files_of_half_and_brain_floats_are_read():
    """The file above with its weights stored in 16 bits."""
    for storage, kind in (("Half", np.dtype("float16")), ("BFloat16", jnp.dtype("bfloat16"))):
        content = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(unpacked(TORCH_ZIP))) as old, zipfile.ZipFile(content, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                if name.endswith("data.pkl"):
                    data = data.replace(b"FloatStorage", f"{storage}Storage".encode())
                elif name.endswith(("data/0", "data/2")):
                    data = np.frombuffer(data, np.float32).astype(kind).tobytes()
                new.writestr(name, data)
        arrays = read_arrays(content.getvalue(), "file")
        assert arrays["a.weight"].dtype == kind
        np.testing.assert_array_equal(arrays["a.weight"].astype(np.float32), [[0, 3], [1, 4], [2, 5]])


@pytest.mark.parametrize("protocol", [3, 4])
def test_numpy_pickles_are_read(protocol):
    tree = {
        "layer": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.array([1.5])},
        "count": collections.OrderedDict(n=np.asfortranarray([[1, 2], [3, 4]])),
    }
    arrays = read_arrays(pickle.dumps(tree, protocol), "file")
    np.testing.assert_array_equal(arrays["layer.kernel"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(arrays["layer.bias"], [1.5])
    np.testing.assert_array_equal(arrays["count.n"], [[1, 2], [3, 4]])


def test_safetensors_are_read():
    arrays = read_arrays(save({"a.b": np.arange(3, dtype=np.float32)}), "file")
    np.testing.assert_array_equal(arrays["a.b"], [0, 1, 2])


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def containers(pickled):
    """A pickle as each kind of file: by itself, in PyTorch's zip, and at each position of PyTorch's old format."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickled)
    start = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps({}, 2)]
    return {
        "single": pickled,
        "zip": archive.getvalue(),
        "old, first": b"".join([start[0], pickled]),
        "old, weights": b"".join([*start, pickled]),
        "old, keys": b"".join([*start, pickle.dumps({}, 2), pickled]),
    }


@pytest.mark.parametrize("kind", containers(b""))
def test_a_pickle_that_asks_for_a_huge_memo_is_refused(kind):
    """Its nine bytes make the unpickler of Python allocate 4 GB."""
    content = containers(b"\x80\x02Nr" + (2**29).to_bytes(4, "little") + b".")[kind]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="file "):
        read_arrays(content, "file")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_groups_that_contain_the_same_group_twice_are_refused():
    tree = {"a": np.zeros(1, np.float32)}
    for _ in range(60):  # 2**60 arrays
        tree = {"a": tree, "b": tree}
    with pytest.raises(UserError, match="file "):
        read_arrays(pickle.dumps(tree, 4), "file")


@pytest.mark.parametrize("kind", containers(b""))
def test_a_malicious_pickle_is_an_error_and_not_executed(kind, tmp_path):
    bait = tmp_path / "bait"
    pickled = pickle.dumps({"weight": Malicious(bait)}, 2)
    content = containers(pickled)[kind]
    with pytest.raises(UserError, match=r"file .*'\w+\.system'"):
        read_arrays(content, "file")
    assert not bait.exists()
    pickle.loads(pickled)
    assert bait.exists(), "the bait does not run, so the test shows nothing"


@pytest.mark.parametrize(
    "name",
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "scalar"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("collections", "OrderedDict.fromkeys"),
        ("sr3_jax.features.weights", "read_file"),
    ],
)
def test_other_names_are_errors(name):
    module, attribute = (part.encode() for part in name)
    for call in (
        b"\x80\x02c" + module + b"\n" + attribute + b"\n.",
        b"\x80\x04" + b"".join(b"\x8c" + bytes([len(x)]) + x for x in (module, attribute)) + b"\x93.",
    ):
        with pytest.raises(UserError, match="not needed for weights"):
            read_arrays(call, "file")


def old_file(arguments, numbers, storage_type=b"FloatStorage"):
    """A file in the format before PyTorch 1.6 with one tensor 'w' on one storage, built with `arguments`."""
    start = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps({}, 2)]
    storage = b"(X\x07\x00\x00\x00storagectorch\n" + storage_type + b"\nX\x01\x00\x00\x000"
    storage += b"X\x03\x00\x00\x00cpuK\x04NtQ"
    items = b"".join(pickle.dumps(item, 2)[2:-1] for item in arguments)
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + items + b"tR"
    tree = b"\x80\x02}X\x01\x00\x00\x00w" + tensor + b"s."
    return b"".join(
        [*start, tree, pickle.dumps(["0"], 2), len(numbers).to_bytes(8, "little"), numbers.tobytes()]
    )


FOUR = np.arange(4, dtype=np.float32)


def test_a_tensor_is_a_view_of_its_storage():
    read = read_arrays(old_file((1, (3,), (1,)), FOUR), "file")
    np.testing.assert_array_equal(read["w"], [1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "numbers"),
    [
        ((1, (4,), (1,)), FOUR),  # past the end
        ((-1, (2,), (1,)), FOUR),
        ((0, (2, 2), (-1, 1)), FOUR),
        ((0, (2, 2), (3, 1)), FOUR),
        ((0, (10**12,), (0,)), FOUR),  # terabytes from four numbers
        ((0, (1 << 62, 4), (0, 0)), FOUR),
    ],
)
def test_a_tensor_outside_its_storage_is_an_error(arguments, numbers):
    with pytest.raises(UserError, match="beyond its data"):
        read_arrays(old_file(arguments, numbers), "file")


def test_arrays_of_objects_are_errors():
    with pytest.raises(UserError, match="file contains an array of"):
        read_arrays(pickle.dumps({"a": np.array([{}, None])}, 4), "file")
    with pytest.raises(UserError, match=r"\(a\.b\)"):
        read_arrays(pickle.dumps({"a": {"b": [1.0]}}, 4), "file")


def test_a_file_cannot_change_how_the_next_one_is_read():
    """A pickle can set attributes on the objects that it gets; they must not be shared."""
    spoil = b"\x80\x02ccollections\nOrderedDict\n(N}X\x05\x00\x00\x00itemsK\x01stb."  # (None, {"items": 1})
    with pytest.raises(UserError):
        read_arrays(spoil, "file")
    assert collections.OrderedDict(a=1).items()
    test_pytorch_files_are_read(TORCH_ZIP)


def damaged():
    zipped, old = unpacked(TORCH_ZIP), unpacked(TORCH_OLD)
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as file:
        file.writestr("holiday.txt", "sun")
    return [
        b"",
        b"<html>not found</html>",
        b"\x80",
        b"\x80\x02.",
        zipped[: len(zipped) // 2],
        zipped[:-30],
        *(old[:end] for end in range(20, len(old) - 1, 37)),
        other.getvalue(),
    ]


@pytest.mark.parametrize("content", damaged())
def test_damaged_files_are_errors(content):
    with pytest.raises(UserError, match=r"^file .*: "):
        read_arrays(content, "file")


def test_read_file_returns_the_sha256(tmp_path):
    (tmp_path / "weights").write_bytes(b"abc")
    content, sha256 = read_file(tmp_path / "weights")
    assert content == b"abc" and sha256 == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(UserError, match=r"none cannot be read \(No such file"):
        read_file(tmp_path / "none")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        read_file(tmp_path)
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(3 * 1024**3)
    with pytest.raises(UserError, match="over 2 GiB"):
        read_file(tmp_path / "huge")
