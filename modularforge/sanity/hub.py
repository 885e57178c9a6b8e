"""Whether the Hub answers at all, asked once: its own library tries for half a minute before it gives up."""

from __future__ import annotations

import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path

from modularforge.config import Config
from modularforge.errors import DataError

SECONDS = 4.0


def require_hub(config: Config) -> None:
    """Raise DataError when a source lies on the Hub and it does not answer within seconds."""
    sources = [source for source in config.data.sources if source.hub and not Path(source.hub).exists()]
    if not sources:
        return
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    if reason := _why_silent(constants.ENDPOINT):
        raise DataError(
            f"the Hub must answer for source {sources[0].name} ({sources[0].hub}), but {constants.ENDPOINT} does not "
            f"({reason}); check the network and HF_ENDPOINT, or name files that are here in data.sources"
        )


def _why_silent(url: str) -> str:
    """Why there is no answer, or nothing; in a thread, because the lookup of a name knows no time limit."""
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(_ask(url)), daemon=True)
    asking.start()
    asking.join(SECONDS + 1)
    return found[0] if found else f"nothing within {SECONDS:.0f} s"


def _ask(url: str) -> str:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return ""  # an answer, whatever it says
    except OSError as error:  # URLError too
        cause = getattr(error, "reason", error)
        return "" if isinstance(cause, ssl.SSLError) else f"{cause}"  # other libraries know other certificates
    except ValueError as error:
        return f"{error}"
    return ""
