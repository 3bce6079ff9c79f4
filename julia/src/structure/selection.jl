"""
    Global(; exclude = (), min_kept = 0)

All prunable weights of the model compete with each other.

Every structure has two options: `exclude`, numbers of layers, in the order of [`prunables`](@ref), that are left alone
and do not count, negative ones from the end, so that `(1, -1)` are the first and the last; and `min_kept`, how many
weights (with [`Neurons`](@ref), neurons) of each layer stay at least, those that score highest.
"""
Base.@kwdef struct Global
    exclude::Any = ()
    min_kept::Int = 0
end

"""
    Layerwise(; exclude = (), min_kept = 0)

Weights compete within their layer. The sparsity may then be one number, or one per competing layer.
"""
Base.@kwdef struct Layerwise
    exclude::Any = ()
    min_kept::Int = 0
end

"""
    PerOutput(; exclude = (), min_kept = 0)

Weights compete with those of the same output (Sun et al. 2023, arXiv:2306.11695). The sparsity may be one number, or one
per competing layer.
"""
Base.@kwdef struct PerOutput
    exclude::Any = ()
    min_kept::Int = 0
end

"""
    ERK(; exclude = (), min_kept = 0)

Weights compete within their layer, the layers' densities by Erdős and Rényi: a layer of `i` inputs and `o` outputs gets a
density proportional to `(i + o) / (i * o)`, at most 1, such that the sparsity asked for is reached over all of them
(Mocanu et al. 2018, arXiv:1707.04780; Evci et al. 2020, arXiv:1911.11134, where the kernel of convolutions counts too).
"""
Base.@kwdef struct ERK
    exclude::Any = ()
    min_kept::Int = 0
end

"""
    NofM(n, m; exclude = (), min_kept = 0)

N:M sparsity: of each `m` consecutive inputs of an output at least `n` weights stay. The weights of such a group compete;
without a sparsity, exactly `n` stay. `NofM(2, 4)` is the layout of PyTorch's semi-structured kernels.

Throws `ArgumentError` unless each competing layer has a multiple of `m` inputs.

# Examples
```jldoctest
julia> model = Chain(PrunableDense(Float32[1 2 3 4; 8 7 6 5]));

julia> prune!(model, Magnitude(); structure = NofM(2, 4));

julia> model[1].mask
2×4 Matrix{Bool}:
 0  0  1  1
 1  1  0  0
```
"""
Base.@kwdef struct NofM
    n::Int = 2
    m::Int = 4
    exclude::Any = ()
    min_kept::Int = 0
    function NofM(n, m, exclude, min_kept)
        1 <= n < m || throw(ArgumentError("NofM's n must be at least 1 and below m = $m, not $n"))
        return new(n, m, exclude, min_kept)
    end
end

NofM(n, m; kwargs...) = NofM(; n, m, kwargs...)

const Weights = Union{Global,Layerwise,PerOutput,ERK,NofM}

"""
    Contest

What competes: `units`, a Bool array per layer that says what is kept, of weights or of neurons; `groups` of places in
them, `(layer, indices)`, that compete with each other; the `layers` that take part; how many each group is to `keep`,
`nothing` if the scores decide.
"""
struct Contest
    units::Vector{<:AbstractArray{Bool}}
    layers::Vector{Int}
    groups::Vector{Vector{Tuple{Int,Tuple}}}
    keep::Union{Nothing,Vector{Int}}
end

"""
    contest(structure, masks, sparsity) -> Contest

What competes under `structure` in a network with these masks, to be pruned to `sparsity`.

Throws `ArgumentError` if a sparsity is outside [0, 1) or missing, if a group is sparser already or cannot lose so many, or
if the structure does not fit the layers, and `DimensionMismatch` if there is not one sparsity per competing layer.
"""
function contest(structure, masks, sparsity)
    isempty(masks) && throw(ArgumentError("model has no prunable layers; prunable(model) makes them"))
    units = competitors(structure, masks)
    layers = competing(structure, length(masks), length(units))
    groups = group(structure, units, layers)
    isnothing(sparsity) && (sparsity = usual_sparsity(structure))
    isnothing(sparsity) && return Contest(units, layers, groups, nothing)
    targets = layer_sparsities(structure, masks, layers, sparsity)
    keep = map(groups) do places
        s = targets[findfirst(==(first(first(places))), layers)]
        n, kept = sum(length, at(units, places)), kept_at(units, places)
        target = n - round(Int, Float64(s) * n)
        target <= kept || throw(ArgumentError("sparsity = $s asks for $(n - target) of $n, but $(n - kept) are pruned \
            already in $(place_name(places)), and pruned stays pruned"))
        target
    end
    return Contest(units, layers, groups, keep)
end

at(arrays, places) = [view(arrays[layer], indices...) for (layer, indices) in places]

"How many of the Bool arrays' entries at these places are `true`."
kept_at(arrays, places) = sum(count, at(arrays, places))

place_name(places) = length(places) == 1 ? "the $(ordinal(first(only(places)))) layer" : "all competing layers"

"How to name the `i`th layer also where layers count from 0."
ordinal(i) = string(i, get(Dict(1 => "st", 2 => "nd", 3 => "rd"), i % 100 in 11:13 ? 0 : i % 10, "th"))

"The Bool arrays that compete: the masks themselves, or which neurons are alive."
competitors(::Weights, masks) = masks

"The sparsity that a structure has of itself."
usual_sparsity(structure) = nothing
usual_sparsity(structure::NofM) = (structure.m - structure.n) / structure.m

"The numbers of the layers that take part, of `n` prunable ones of which the first `m` could."
function competing(structure, n, m)
    structure.min_kept >= 0 || throw(ArgumentError("min_kept must be at least 0, not $(structure.min_kept)"))
    excluded = map(collect(structure.exclude)) do i
        1 <= abs(i) <= n || throw(ArgumentError("exclude must be numbers of prunable layers, 1 to $n or -1 to -$n, not $i"))
        i < 0 ? n + 1 + i : i
    end
    layers = setdiff(1:m, excluded)
    isempty(layers) && throw(ArgumentError("exclude must leave layers that can be pruned, not $(structure.exclude)"))
    return layers
end

"All indices of an array, but of its first dimensions those given."
rest(unit, indices...) = (indices..., ntuple(_ -> :, ndims(unit) - length(indices))...)

group(::Global, units, layers) = [Tuple{Int,Tuple}[(l, rest(units[l])) for l in layers]]
group(::Union{Layerwise,ERK}, units, layers) = [Tuple{Int,Tuple}[(l, rest(units[l]))] for l in layers]
group(::PerOutput, units, layers) = [Tuple{Int,Tuple}[(l, rest(units[l], i))] for l in layers for i in axes(units[l], 1)]
function group(structure::NofM, units, layers)
    (; n, m) = structure
    for l in layers
        size(units[l], 2) % m == 0 || throw(ArgumentError(
            "NofM($n, $m) needs layers with a multiple of $m inputs, but the $(ordinal(l)) has $(size(units[l], 2)); exclude \
             leaves layers alone"))
    end
    return [Tuple{Int,Tuple}[(l, (i, j:(j + m - 1), Tuple(k)...))] for l in layers for i in axes(units[l], 1)
            for j in 1:m:size(units[l], 2) for k in CartesianIndices(size(units[l])[3:end])]
end

"The sparsity asked for in each competing layer."
function layer_sparsities(structure, masks, layers, sparsity)
    per_layer = structure isa Union{Layerwise,PerOutput} || structure isa Neurons && structure.layerwise
    sparsity isa Real || sparsity isa Union{AbstractVector,Tuple} && all(s -> s isa Real, sparsity) || throw(ArgumentError(
        "sparsity must be a number, or numbers, not $(repr(sparsity))"))
    sparsity isa Real || per_layer && length(sparsity) == length(layers) || throw(DimensionMismatch(
        "sparsity must be one number$(per_layer ? " or one per competing layer ($(length(layers)))" : ""), \
         not $(length(sparsity)) numbers with $(nameof(typeof(structure)))"))
    for s in sparsity
        0 <= s < 1 || throw(ArgumentError("sparsity must be in [0, 1), not $s"))
    end
    structure isa NofM && sparsity > max(usual_sparsity(structure), 1 - structure.n / structure.m) && throw(ArgumentError(
        "sparsity must be at most $(usual_sparsity(structure)) with NofM($(structure.n), $(structure.m)), not $sparsity"))
    structure isa ERK && return erdos_renyi(masks[layers], sparsity)
    return sparsity isa Real ? fill(sparsity, length(layers)) : sparsity
end

function erdos_renyi(masks, sparsity)
    n, sides = map(length, masks), map(sum ∘ size, masks)
    keep, dense = sum(n) - round(Int, sparsity * sum(n)), falses(length(n))
    while true
        ε = (keep - sum(n[dense])) / sum(sides[.!dense])
        fuller = .!dense .& (ε .* sides .> n)
        any(fuller) || return ifelse.(dense, 0.0, 1 .- ε .* sides ./ n)
        dense .|= fuller
    end
end

"""
    select(structure, scores, masks, sparsity) -> Vector of Bool arrays

New masks in which exactly `round(sparsity * n)` (ties to even) of the `n` weights of each competing group
are pruned: those that `masks` prunes already, and of the others those with the lowest scores. Equal scores
are settled by position: layer, then output, then input index, then place in the kernel, the first going first. The
arrays have the dimensions `(out, in, kernel...)`, see [`canonical`](@ref).

Throws what [`contest`](@ref) throws, `ArgumentError` if a score is NaN or what competes cannot be scored so, and
`DimensionMismatch` if there is not one score array of the right size per layer.
"""
function select(structure, scores, masks, sparsity)
    match = contest(structure, masks, sparsity)
    return select(structure, scores, masks, match, match.keep)
end

function select(structure, scores, masks, match::Contest, keep)
    (; units, layers, groups) = match
    scores = unit_scores(structure, scores, masks)
    any(l -> any_nan(scores[l], units[l]), layers) && throw(ArgumentError("saliency gave NaN scores, which cannot be ranked"))
    safe = structure.min_kept > 0 ? map((score, unit) -> protected(score, unit, structure.min_kept), scores, units) : nothing
    new = isnothing(safe) ? map(copy, units) : map((unit, s) -> unit .& .!s, units, safe)
    drop = map(groups, keep) do places, k
        n = kept_at(units, places) - k
        isnothing(safe) || n <= kept_at(new, places) || throw(ArgumentError(
            "sparsity leaves $k of $(place_name(places)), but min_kept = $(structure.min_kept) of each layer must stay"))
        max(0, n) # others may have died too
    end
    foreach((places, k) -> k == 0 || drop_lowest!(at(new, places), at(scores, places), k), groups, drop)
    isnothing(safe) || foreach((unit, s) -> unit .|= s, new, safe)
    return to_masks(structure, map(on_host, new), masks)
end

"Scores of what competes, from the scores that a criterion gave."
function unit_scores(::Weights, scores, masks)
    any(s -> s isa AbstractVector, scores) && throw(ArgumentError(
        "structure must be Neurons with a saliency that scores neurons"))
    map(size, scores) == map(size, masks) || throw(DimensionMismatch(
        "saliency must give one score per prunable weight, sizes $(map(size, masks)), not $(map(size, scores))"))
    return scores
end

"The new masks, from what is kept of what competes."
to_masks(::Weights, units, masks) = units

"The `k` kept entries with the highest scores."
function protected(scores, kept, k)
    k > 0 || return fill!(similar(kept), false)
    return only(drop_lowest!([copy(kept)], [scores], max(0, count(kept) - k)))
end

function any_nan(scores, kept)
    found = false
    @inbounds for i in eachindex(scores, kept)
        found |= kept[i] & isnan(scores[i])
    end
    return found
end

# Selection passes over scores and masks where they lie, a few times, and needs no memory for each: it counts which bits the
# scores begin with, then, of those that begin as the threshold does, which bits come next, until few are left.

"By how many bits one pass counts, such that the counts stay in the fastest cache."
const DIGIT = 11

"How many scores are sorted rather than counted."
const FEW = 1 << 14

"Set to `false` the `k` kept entries with the lowest scores, of equal ones the first."
function drop_lowest!(masks, scores, k)
    k == 0 && return masks
    T = all(score -> eltype(score) <: Union{Float16,Float32}, scores) ? Float32 : Float64
    threshold, k, equal = nth_lowest(T, masks, scores, k)
    for (mask, score) in zip(masks, scores)
        drop_where!(k == equal ? (<=) : (<), mask, score, threshold)
        k == equal || (k -= drop_first!(mask, score, threshold, k))
    end
    return masks
end

"The `k`-th lowest of the kept scores, as a `T`; the how manieth it is of those equal to it; and how many these are."
function nth_lowest(::Type{T}, masks, scores, k) where {T}
    n, bits, prefix = sum(length, masks), 8sizeof(T), zero(ordered_bits(zero(T)))
    while n > FEW && bits > 0
        digit = min(DIGIT, bits)
        bits -= digit
        counts = zeros(Int, 1 << digit)
        foreach((mask, score) -> count_next!(counts, mask, score, prefix, bits, T), masks, scores)
        d = 1
        while k > counts[d]
            k -= counts[d]
            d += 1
        end
        n, prefix = counts[d], prefix | oftype(prefix, d - 1) << bits
    end
    bits == 0 && return from_ordered_bits(prefix), k, n
    left, found = Vector{T}(undef, n + 1), 0
    for (mask, score) in zip(masks, scores)
        found = gather!(left, found, mask, score, prefix, bits)
    end
    threshold = partialsort!(resize!(left, found), k)
    return threshold, k - count(<(threshold), left), count(==(threshold), left)
end

# Numbers in the order of the scores, -0.0 being equal to 0.0.
ordered_bits(x::Float32) = flip(reinterpret(UInt32, x + 0.0f0))
ordered_bits(x::Float64) = flip(reinterpret(UInt64, x + 0.0))
from_ordered_bits(u::UInt32) = reinterpret(Float32, unflip(u))
from_ordered_bits(u::UInt64) = reinterpret(Float64, unflip(u))
sign_bit(u) = one(u) << (8sizeof(u) - 1)
flip(u) = ifelse(u < sign_bit(u), u | sign_bit(u), ~u)
unflip(u) = ifelse(u < sign_bit(u), ~u, u & ~sign_bit(u))

"Count the kept scores that begin with `prefix`, which ends above the bits to count by and `bits` others, by those."
function count_next!(counts, mask, score, prefix, bits, ::Type{T}) where {T}
    @inbounds for i in eachindex(mask, score)
        d = (ordered_bits(T(score[i])) ⊻ prefix) >> bits
        d < length(counts) && (counts[d + 1] += mask[i])
    end
    return counts
end

function gather!(left::Vector{T}, found, mask, score, prefix, bits) where {T}
    @inbounds for i in eachindex(mask, score) # written first and kept or not after, as which are kept cannot be predicted
        left[found + 1] = T(score[i])
        found += mask[i] & ((ordered_bits(T(score[i])) ⊻ prefix) >> bits == 0)
    end
    return found
end

function drop_where!(comparison::F, mask, score, threshold::T) where {F,T}
    @inbounds @simd for i in eachindex(mask, score)
        mask[i] &= !comparison(T(score[i]), threshold)
    end
    return mask
end

"""
Set to `false` the first `k` kept entries with this score, in the order of output, input and place in the kernel; return how
many there were.
"""
function drop_first!(mask, score, threshold::T, k) where {T}
    equal = zeros(Int, size(mask, 1))
    @inbounds for I in CartesianIndices(mask)
        equal[I[1]] += mask[I] & (T(score[I]) == threshold)
    end
    before = cumsum(equal)
    last_row = searchsortedfirst(before, k) # in which the k-th is
    @inbounds for I in CartesianIndices(mask)
        mask[I] &= (I[1] >= last_row) | (T(score[I]) != threshold)
    end
    last_row > length(before) && return sum(equal)
    row = CartesianIndices(mask)[last_row:last_row, ntuple(_ -> :, ndims(mask) - 1)...]
    places = sort!([I for I in row if mask[I] & (T(score[I]) == threshold)]; by = Tuple)
    mask[first(places, k - before[last_row] + equal[last_row])] .= false
    return k
end
