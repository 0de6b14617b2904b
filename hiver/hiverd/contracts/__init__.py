"""What plug-ins implement and import. Nothing in here imports the rest of the server."""
