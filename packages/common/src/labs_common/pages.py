"""Pages for the browser, made with Gradio (an extra of the labs that have one)."""

import importlib.util
import socket
from typing import Any

from labs_common.errors import LabError, reason_of
from labs_common.options import PageOptions


def check_page(options: PageOptions, extra: str) -> None:
    """Refuses a page that cannot be served; `extra` is what installs Gradio, which some labs have for their page.

    Raises:
        LabError: Gradio is not installed, the address is none, or the port is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise LabError(f"demo: needs Gradio; install the extra {extra}")
    try:
        with socket.socket() as probe:
            taken = probe.connect_ex((options.host, options.port)) == 0
    except (OSError, UnicodeError) as error:  # a name that nobody knows, or that cannot be one
        remedy = "leave it out, or take 0.0.0.0 to let other machines in"
        raise LabError(f"--host {options.host}: is no address ({reason_of(error)}); {remedy}") from error
    if taken:
        raise LabError(f"--port {options.port}: is in use; name another")


def serve(page: Any, options: PageOptions) -> None:
    """Serves a page of Gradio until Ctrl-C.

    Raises:
        LabError: this machine does not have the address.
    """
    try:
        page.launch(server_name=options.host, server_port=options.port, share=False, quiet=False, footer_links=[])
    except OSError as error:
        said = f"--host {options.host} --port {options.port}: cannot be listened on ({reason_of(error)})"
        raise LabError(f"{said}; name others") from error
