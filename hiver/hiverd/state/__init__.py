"""SQLite state: one writer, numbered migrations, the sandbox records and the event journal."""
