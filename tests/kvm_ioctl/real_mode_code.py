"""Code for the guest of `conftest`, in hex: what several modules let it run."""

HLT = "f4"
SPIN = "ebfe"

OUT_IN_STORE_HLT = "b041 e6f8 e4f9 a20090 f4"
"""mov al,0x41; out 0xf8,al; in al,0xf9; mov [0x9000],al; hlt"""
