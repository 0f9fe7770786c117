"""File arguments as the shell gives them."""

from __future__ import annotations

import click


class FilesAfterFlags(click.Command):
    """Lets an option that may be repeated take several files after one flag, as the shell's ``*`` gives them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the flag before every file that follows it."""
        lists = {
            name
            for parameter in self.params
            if isinstance(parameter, click.Option) and parameter.multiple
            for name in parameter.opts
        }
        expanded: list[str] = []
        current = ""
        for word in args:
            if word.startswith("-") and word != "-":
                current = word if word in lists else ""
                if not current:
                    expanded.append(word)
            elif current:
                expanded += [current, word]
            else:
                expanded.append(word)
        return super().parse_args(ctx, expanded)
