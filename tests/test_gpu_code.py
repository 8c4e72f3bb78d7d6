"""What is told of the kernel's code, and what is asked of whoever wants to see it."""

import collections
import importlib.util

import pytest

from benchmarks import gpu_code

LISTING = """
.L_x_1:
        /*0010*/                   MOV R1, c[0x0][0x28] ;
.L_x_2:
        /*0020*/              @!P1 LDS.64 R2, [R3] ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0040*/                   VIMNMX R5, R6, R7, PT ;
        /*0050*/                   VIMNMX3 R5, R6, R7, R8, PT ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3) ;
"""


def test_the_loop_is_the_shortest_one_with_products():
    found = gpu_code.loop_of(LISTING)
    assert found == collections.Counter(LDS=1, HGMMA=1, VIMNMX=1, VIMNMX3=1)
    assert gpu_code.loop_of("") == collections.Counter()


def test_a_row_tells_the_floors():
    # 128 scores of a thread: two and a half minima each, and nothing else.
    code = gpu_code.Code(8, 1000, collections.Counter(VIMNMX=256, VIMNMX3=64))
    cells = gpu_code.row_of(64, False, code).strip("| ").split(" | ")
    assert cells[:5] == ["64", "two", "128 × 128 × 4", "1,000", "8"]
    assert cells[5:] == ["2.50", "2.50", "28", "35", "17"]
    untold = gpu_code.row_of(64, True, gpu_code.Code(0, 1000, collections.Counter()))
    assert untold.endswith("| – | – | 28 | – | – |")


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="CUDA is there"
)
def test_without_cuda_it_is_a_sentence(capsys):
    with pytest.raises(SystemExit):
        gpu_code.main([])
    assert "accepted: an environment with jkmeans[cuda13]" in capsys.readouterr().err
