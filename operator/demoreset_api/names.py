"""Names that more than one process relies on; each is written here once."""

API_VERSION = "demoreset.dev/v1alpha1"
KIND = "DemoResetRun"
METRICS_PORT = 9400
METRIC_PREFIX = "demoreset_"
