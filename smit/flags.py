"""How the commands' --help looks. Needs the standard library alone."""
import argparse


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A description as it stands, and every default that says something."""

    def _get_help_string(self, action):
        silent = str(action.default) in ("None", "False", "[]", "")
        return action.help if silent else super()._get_help_string(action)
