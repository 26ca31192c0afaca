"""The C header that guests and their Python driver share, generated from the declarations."""

import ctypes

from guest_images.proxy_header import proxy_constants, proxy_structs
from harness.machine import guest_abi as abi
from harness.svm.cheader import c_defines, c_enum, c_header, svm_constants, svm_structs

HEADER_NAME = "guest_abi.h"


def generated_header() -> str:
    """Return the text of `guest_abi.h`."""
    return c_header("GUEST_ABI_H", [*svm_constants(), *_guest_constants()], _guest_structs())


def _guest_constants() -> list[str]:
    numbers = {
        "PAGE_SIZE": abi.PAGE_SIZE,
        "SERIAL_PORT": abi.SERIAL_PORT,
        "DEBUG_EXIT_PORT": abi.DEBUG_EXIT_PORT,
        "STAGE_PORT": abi.STAGE_PORT,
        "HELLO_STATUS": abi.HELLO_STATUS,
        "MAX_VCPUS": abi.MAX_VCPUS,
    }
    text = abi.HELLO_TEXT.replace("\n", "\\n")
    return [
        c_defines(numbers),
        f'#define HELLO_TEXT "{text}"\n',
        c_enum(abi.Stage, "STAGE_"),
        c_enum(abi.Command, "COMMAND_"),
        c_defines({f"OPTION_{option.name}": option.value for option in abi.Option}),
        c_enum(abi.Status, "STATUS_"),
        *proxy_constants(),
    ]


def _guest_structs() -> list[type[ctypes.Structure]]:
    return [*svm_structs(), abi.report, abi.cpu_area, *proxy_structs()]


def linker_symbols() -> dict[str, int]:
    """Return the addresses that the linker script takes from the declarations."""
    return {"IMAGE_GPA": abi.IMAGE_GPA, "CPU_AREAS_GPA": abi.CPU_AREAS_GPA}
