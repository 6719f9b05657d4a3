"""The command line called in this process."""

from hodec.cli import main as cli


def call(capsys, *argv):
    """Exit code, stdout and stderr."""
    code = cli.main([str(one) for one in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err
