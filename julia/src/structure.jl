"""
    Global()

All prunable weights of the model compete with each other.
"""
struct Global end

"""
    Layerwise()

Weights compete within their layer. The sparsity may then be one number, or one per layer.
"""
struct Layerwise end

"""
    groups(structure, n) -> Vector of index vectors

Which of the model's `n` prunable layers compete together.
"""
groups(::Global, n) = [1:n]
groups(::Layerwise, n) = [i:i for i in 1:n]

"""
    select(structure, scores, masks, sparsity) -> Vector{Matrix{Bool}}

New masks in which exactly `round(sparsity * n)` (ties to even) of the `n` weights of each competing group
are pruned: those that `masks` prunes already, and of the others those with the lowest scores. Equal scores
are settled by position: layer, then output, then input index, the first going first.

Throws `ArgumentError` if a sparsity is outside [0, 1), if a score is NaN, or if a group is sparser already,
and `DimensionMismatch` if there is not one sparsity, or one score array of the right size, per group or layer.
"""
function select(structure, scores, masks, sparsity)
    map(size, scores) == map(size, masks) || throw(DimensionMismatch(
        "saliency must give one score per prunable weight, sizes $(map(size, masks)), not $(map(size, scores))"))
    any(((score, mask),) -> any(isnan, score[mask]), zip(scores, masks)) &&
        throw(ArgumentError("saliency gave NaN scores, which cannot be ranked"))
    group = groups(structure, length(masks))
    drops = to_drop(structure, masks, sparsity)
    new = [Matrix{Bool}(mask) for mask in masks]
    foreach((layers, k) -> drop_lowest!(new[layers], scores[layers], k), group, drops)
    return new
end

"How many more weights of each competing group must go; throws what [`select`](@ref) does for `sparsity`."
function to_drop(structure, masks, sparsity)
    isempty(masks) && throw(ArgumentError("model has no prunable layers; prunable(model) makes them"))
    group = groups(structure, length(masks))
    sparsity isa Real || length(sparsity) == length(group) || throw(DimensionMismatch(
        "sparsity must be one number$(structure isa Layerwise ? " or one per layer ($(length(group)))" : ""), \
         not $(length(sparsity)) numbers with $structure"))
    targets = sparsity isa Real ? fill(sparsity, length(group)) : sparsity
    return map(group, targets) do layers, s
        0 <= s < 1 || throw(ArgumentError("sparsity must be in [0, 1), not $s"))
        n = sum(i -> length(masks[i]), layers)
        pruned = n - sum(i -> count(masks[i]), layers)
        drop = round(Int, s * n) - pruned
        drop >= 0 || throw(ArgumentError("sparsity = $s asks for $(round(Int, s * n)) of $n weights, but \
            $pruned are pruned already in layers $layers, and pruned stays pruned"))
        drop
    end
end

"Set to `false` the `k` kept entries with the lowest scores."
function drop_lowest!(masks, scores, k)
    k == 0 && return masks
    kept = reduce(vcat, map(getindex, scores, masks))
    threshold = partialsort!(kept, k)
    for (mask, score) in zip(masks, scores)
        below = mask .& (score .< threshold)
        mask[below] .= false
        k -= count(below)
    end
    for (mask, score) in zip(masks, scores)
        k == 0 && break
        tied = first(sort!(findall(mask .& (score .== threshold)); by = Tuple), k)
        mask[tied] .= false
        k -= length(tied)
    end
    return masks
end
