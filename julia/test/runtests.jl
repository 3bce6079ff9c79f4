using Test

@testset "PrunableFlux" begin
    include("networks.jl")
    @testset "$name" for name in ("layers", "selection", "saliency", "structure", "conv", "schedule", "training", "experiment",
                                  "strategies", "sparse", "device", "quality")
        include("$name.jl")
    end
end
