"""What the plug-ins that run Linux containers share: namespaces, mounts, control groups, runtimes and monitors.

Nothing in here knows who made a container, a runtime called by us or Docker's daemon.
"""
