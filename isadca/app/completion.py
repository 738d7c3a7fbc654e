"""isadca completion: what a shell needs to complete commands, flags and their values, made from the parser itself."""

from argparse import Namespace

from ..methods import PRESETS
from .flags import Parser, parser

SCRIPT = """_isadca() {{
    local words
    case "${{COMP_WORDS[1]}} $3" in
{cases}
        *) words="{commands}" ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$2"))
}}
complete -o default -F _isadca isadca"""  # $2 is what was typed, $3 the word before; files where nothing fits


def completion(args: Namespace) -> None:
    commands = parser()[1]
    cases = [case for name, command in commands.items() for case in _cases(name, command)]
    if args.shell == "zsh":
        print("autoload -Uz bashcompinit && bashcompinit")
    print(SCRIPT.format(cases="\n".join(cases), commands=" ".join(commands)))


def _cases(name: str, command: Parser) -> list[str]:
    """A flag's values after it, the command's flags elsewhere."""
    words, cases = list[str](), list[str]()
    for action in command._actions:
        choices = PRESETS if action.dest == "method" else action.choices or ()
        words += action.option_strings[-1:] or choices
        for flag in action.option_strings if choices else ():
            cases.append(f'        "{name} {flag}") words="{" ".join(choices)}" ;;')
    return [*cases, f'        "{name} "*) words="{" ".join(words)}" ;;']
