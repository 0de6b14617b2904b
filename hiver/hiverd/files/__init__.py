"""Files of a sandbox: volumes on bounded disk, the file API, mounts."""
