"""Check whether the Hugging Face hub is reachable.

Its client retries a failed request five times with growing pauses, for each file. On a machine without
network that is a minute of silence, so one short probe decides in advance whether to use the hub at all.
"""

import urllib.request
from urllib.error import HTTPError

PROBE_SECONDS = 5.0


def hub_reachable() -> bool:
    """True if the hub answers one request within five seconds and offline mode is not set."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
            return True
    except HTTPError:
        return True  # it answered, even if with an error status
    except OSError:
        return False
