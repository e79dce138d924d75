"""Names that more than one process relies on; each is written here once."""

API_VERSION = "demoreset.dev/v1alpha1"
KIND = "DemoResetRun"
GROUP, VERSION = API_VERSION.split("/")
PLURAL, SINGULAR, SHORT = "demoresetruns", "demoresetrun", "drr"
MANAGER = "demoreset.dev/operator"  # who manages a run where spec.managedBy does not say
METRICS_PORT = 9400
COORDINATOR_PORT = 29510
TERMINATION_LOG = "/dev/termination-log"  # where Kubernetes reads a container's last words

# Where a process is told where it is; flags of the same meaning win.
ENV_COORDINATOR = "DEMORESET_COORDINATOR"  # host:port of the run's coordinator
ENV_ADDRESS = "DEMORESET_ADDRESS"  # where other members reach this one: the pod's IP
ENV_ID = "DEMORESET_ID"  # the worker's name; its members are called after it
ENV_CUDA_GRAPHS = "DEMORESET_CUDA_GRAPHS"  # 0: nothing is recorded for a GPU
ENV_CORES = "DEMORESET_CORES"  # cores that a process may use; members share their worker's
ENV_CACHE = "DEMORESET_CACHE"  # folder of the start states of demos
ENV_GRACE = "DEMORESET_GRACE_SECONDS"  # from SIGTERM until the cluster kills a worker
ENV_HANG = "DEMORESET_HANG_SECONDS"  # without a beat, after which a worker kills a member
ENV_START = "DEMORESET_START_SECONDS"  # that a member has to load and ask the coordinator
ENV_DEAD = "DEMORESET_DEAD_MS"  # without a beat, after which a member is lost
ENV_WIRE = "DEMORESET_WIRE"  # file descriptor on which a member tells its supervisor
ENV_EVENTS = "DEMORESET_EVENTS"  # file that members append their events to, for measurements
ENV_TERMINATION_LOG = "DEMORESET_TERMINATION_LOG"  # instead of Kubernetes' own place

# Phases of a worker's loop that others know, too.
STARTING = "starting"
QUORUM = "quorum"  # waits for the others
CONFIRM = "confirm"  # plays the goal's episodes, for as long as they take; the others wait
ASIDE = "aside"  # sits out while its network is too slow; the others train

# On every object that the operator makes. A run's are found by its UID, never by its name: another
# run of this name may have been there before.
OPERATOR_NAME = "demoreset-operator"  # app.kubernetes.io/managed-by, and who applies
LABEL_RUN = "demoreset.dev/run"
LABEL_RUN_UID = "demoreset.dev/run-uid"
LABEL_WORKER = "demoreset.dev/worker"  # a worker's number, from 0
LABEL_ATTEMPT = "demoreset.dev/attempt"  # which incarnation of that worker a pod is, from 1
LABEL_GENERATION = "demoreset.dev/generation"  # of the run's spec, when a pod was made
LABEL_COMPONENT = "app.kubernetes.io/component"
LABEL_VERSION = "app.kubernetes.io/version"  # of the operator that made an object
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
ANNOTATION_HASH = "demoreset.dev/hash"  # of what an object was made from
ANNOTATION_CONFIG = "demoreset.dev/config"  # of what a worker was told to learn
ANNOTATION_IMAGE = "demoreset.dev/image"  # a trainer's, for the plugin to read the volume with
OUT_OF_MEMORY = "OutOfMemory"  # begins the last words of a worker that the kernel killed for it
COMPONENT_WORKER, COMPONENT_COORDINATOR = "worker", "coordinator"

# The operator's own.
OPERATOR_PORT = 8080  # /metrics, /healthz, /readyz
LEASE = "demoreset-operator"  # who holds it acts; the others wait
