"""Pages for the browser, made with Gradio (an extra of the labs that have one)."""

import importlib.util
import socket
from typing import Any

from labs_common.errors import LabError
from labs_common.options import PageOptions


def check_page(options: PageOptions, extra: str) -> None:
    """Refuses a page that cannot be served; `extra` is what installs Gradio, which some labs have for their page.

    Raises:
        LabError: Gradio is not installed, or the port is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise LabError(f"demo: needs Gradio; install the extra {extra}")
    with socket.socket() as probe:
        if probe.connect_ex((options.host, options.port)) == 0:
            raise LabError(f"--port {options.port}: is in use; name another")


def serve(page: Any, options: PageOptions) -> None:
    """Serves a page of Gradio until Ctrl-C."""
    page.launch(server_name=options.host, server_port=options.port, share=False, quiet=False, footer_links=[])
