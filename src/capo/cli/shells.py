"""Completion in bash and zsh as keys of a configuration need it; Typer's own scripts are for plain words.

After a key, `training.steps=`, no space follows. Bash takes the ``=`` for the end of a word, so that what it
is offered behind one is only the rest. Both scripts ask for what is offered in the form made for fish: a line
a word, and its help behind a tab.
"""

from __future__ import annotations

import os

VARIABLE = "_CAPO_COMPLETE"  # set where a shell asks for a script, or for what to offer

BASH = r"""
%(complete_func)s() {
    local IFS=$'\n' line=${COMP_LINE:0:COMP_POINT} word
    COMPREPLY=( $( env %(autocomplete_var)s=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args \
                   _TYPER_COMPLETE_ARGS="$line" $1 | cut -f 1 ) )
    word=${line##*[[:space:]]}
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then
        COMPREPLY=( "${COMPREPLY[@]#"${word%%"${word##*=}"}"}" )
    fi
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]]; then
        compopt -o nospace
    fi
    return 0
}

complete -o default -F %(complete_func)s %(prog_name)s
"""

ZSH = r"""
#compdef %(prog_name)s

%(complete_func)s() {
  local -a keys offers
  local word help
  while IFS=$'\t' read -r word help; do
    if [[ $word == *= ]]; then
      keys+=("$word")
    elif [[ -n $word ]]; then
      offers+=("${word//:/\\:}${help:+:$help}")
    fi
  done < <(env %(autocomplete_var)s=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args \
    _TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" %(prog_name)s)
  (( $#keys )) && compadd -S '' -a keys
  (( $#offers )) && _describe '' offers
  (( $#keys + $#offers )) || _files
}

compdef %(complete_func)s %(prog_name)s
"""


def prepare() -> None:
    """Have Typer install and print these scripts, and offer every help in a line of its own."""
    if VARIABLE in os.environ:
        os.environ["COLUMNS"] = "1000"  # what would be wrapped would be taken for another word
    try:
        from typer._completion_classes import BashComplete, ZshComplete
        from typer._completion_shared import _completion_scripts
    except ImportError:  # a Typer that keeps them elsewhere: its own do for all but the keys
        return
    BashComplete.source_template = _completion_scripts["bash"] = BASH
    ZshComplete.source_template = _completion_scripts["zsh"] = ZSH
