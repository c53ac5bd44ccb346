"""Ray sessions, object stores, jobs: everything that is not about images.

Ray and pyarrow read parts of their configuration once, when they are loaded; so it is set here, before any module of this package can
load them.
"""

import os

ENVIRONMENT = {
    # Every Ray that this project starts or joins asks for its token.
    "RAY_AUTH_MODE": "token",
    # Stores other than AWS refuse the trailing checksums that recent AWS SDKs add to uploads (HTTP 411).
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    # A failed task is reported once, by us; Ray would repeat it on standard error.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Else Tune takes Ctrl-C for the end of the search, returns what there is, and keeps its handler.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_TRAIN_ENABLE_V2": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}
"""Set where the user has not set it, in every process."""

for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
