"""The reference of all settings, written from the dataclasses that hold them: a page and a JSON schema."""
