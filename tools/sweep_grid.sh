# shellcheck shell=bash
# Expand the grid of tools/sweep.sh, which sources this file: name_combinations sets names[i], the name of combination i, and
# words[i], its words as the shell reads them. It calls the function fail of sweep.sh with an error message.

encode() { # VALUE -> reply: part of a file name, different for different values
    local LC_ALL=C i char code
    reply=""
    for ((i = 0; i < ${#1}; i++)); do
        char=${1:i:1}
        case $char in
            [A-Za-z0-9._-]) reply+=$char ;;
            /) reply+="~" ;;
            *)
                printf -v code '%d' "'$char"
                printf -v code '%%%02X' $((code & 255))
                reply+=$code
                ;;
        esac
    done
}

is_option() {
    [[ $1 =~ ^--?[A-Za-z] ]]
}

name_of() { # WORDS... -> reply: such as lr=0.1,schedule=60+80
    local name="" word before=""
    for word in "$@"; do
        if is_option "$word"; then
            before=option
            while [[ $word == -* ]]; do word=${word#-}; done
            encode "${word%%=*}"
            name+=${name:+,}$reply
            [[ $word == *=* ]] || continue
            word=${word#*=}
        fi
        encode "$word"
        case $before in option) name+="=$reply" ;; *) name+="+$reply" ;; esac
        before=value
    done
    reply=${name:-none}
}

quote() { # WORDS... -> reply: the words as the shell reads them
    reply=""
    [ $# -eq 0 ] || printf -v reply '%q ' "$@"
}

alternatives() { # GRID -> choice_names, choice_words: the alternatives of one grid
    local tokens=() token option several="" group=()
    # xargs splits at spaces and reads quotes, and expands nothing
    while IFS= read -r -d '' token; do tokens+=("$token"); done < <(printf '%s' "$1" | xargs printf '%s\0' 2>/dev/null)
    printf '%s' "$1" | xargs printf '%s\0' >/dev/null 2>&1 || fail "the grid \"$1\": a quote is not closed"
    choice_names=() choice_words=()
    [ -n "${tokens[*]-}" ] || fail "an empty grid; is a shell variable not set?"
    for token in "${tokens[@]}"; do
        refuse_own "$token"
        [ "$token" != "|" ] || several=1
    done
    is_option "${tokens[0]}" || [ -n "$several" ] ||
        fail "the grid \"$1\": must start with an option and be one word in quotes, such as \"--lr 0.1 0.3\""
    if [ -n "$several" ]; then
        for token in "${tokens[@]}" "|"; do
            if [ "$token" != "|" ]; then
                group+=("$token")
                continue
            fi
            [ ${#group[@]} -eq 0 ] || is_option "${group[0]}" || fail "the grid \"$1\": each alternative starts with an option"
            name_of ${group[@]+"${group[@]}"} && choice_names+=("$reply")
            quote ${group[@]+"${group[@]}"} && choice_words+=("$reply")
            group=()
        done
        return
    fi
    option=${tokens[0]}
    [ ${#tokens[@]} -gt 1 ] || fail "the grid \"$1\": has no value; \"$option |\" runs with and without a switch"
    for token in "${tokens[@]:1}"; do
        ! is_option "$token" || fail "the grid \"$1\": write | between alternatives of several options"
        name_of "$option" "$token" && choice_names+=("$reply")
        quote "$option" "$token" && choice_words+=("$reply")
    done
}

name_combinations() { # GRID...
    local one i j more_names more_words twice
    names=("") words=("")
    for one in "$@"; do
        alternatives "$one"
        more_names=() more_words=()
        for ((i = 0; i < ${#names[@]}; i++)); do
            for ((j = 0; j < ${#choice_names[@]}; j++)); do
                more_names+=("${names[i]}${names[i]:+,}${choice_names[j]}")
                more_words+=("${words[i]}${choice_words[j]}")
            done
        done
        names=("${more_names[@]}") words=("${more_words[@]}")
    done
    for ((i = 0; i < ${#names[@]}; i++)); do
        if [ ${#names[i]} -gt 180 ]; then # a file name has at most 255 bytes, and .log follows
            names[i]=${names[i]:0:160}~$(printf '%s' "${names[i]}" | cksum | cut -d ' ' -f 1)
        fi
    done
    twice=$(printf '%s\n' "${names[@]}" | sort | uniq -d | head -n 1)
    [ -z "$twice" ] || fail "the grid has $twice twice"
}
